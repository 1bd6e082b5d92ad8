// What is copied from many places into one contiguous area, decided once per layout.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "box.h"

namespace everstep {

// A strided box whose bytes, in C order, are part of the area.
struct Piece {
    int64_t start;  // in the area
    std::vector<int64_t> shape;
    std::vector<int64_t> strides_bytes;
    int64_t item_bytes;
};

// Boxes that follow each other without gaps in an area of data_bytes, which is cut into blocks with
// a CRC-32C each. Immutable; any number of threads may copy blocks at once.
class CopyPlan {
  public:
    // Throws std::invalid_argument, naming the piece, when something makes no sense.
    CopyPlan(std::span<const Piece> pieces, int64_t data_bytes, int64_t block_bytes);

    int64_t pieces() const { return pieces_; }
    int64_t data_bytes() const { return data_bytes_; }
    int64_t block_bytes() const { return block_bytes_; }
    int64_t blocks() const { return data_bytes_ / block_bytes_ + (data_bytes_ % block_bytes_ > 0); }

    // Bytes of a block; only the last one may have fewer than block_bytes.
    int64_t bytes_of(int64_t block) const;

    // Throws std::invalid_argument where the addresses cannot be those of the pieces (of the
    // element with index 0 in every dimension; ignored for empty pieces), or where a piece and
    // the area overlap.
    void check_addresses(std::span<const uint64_t> addresses, std::span<const uint8_t> area) const;

    // Copies a block to its place in the area and returns its CRC. Afterwards another thread may
    // read the bytes as soon as it is told so in the usual ways.
    uint32_t copy_block(int64_t block, std::span<const uint64_t> addresses, uint8_t* area) const;

  private:
    struct Source {
        int64_t start;
        size_t piece;
        ByteRange reach;  // from its address
        BoxPair box;
    };

    int64_t pieces_;
    int64_t data_bytes_;
    int64_t block_bytes_;
    std::vector<Source> sources_;  // pieces that are not empty, in order
};

}  // namespace everstep
