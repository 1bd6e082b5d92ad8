// The copy engine: strided boxes, with and without block checksums. All arguments are checked
// before the first byte is touched; std::invalid_argument says which one is wrong.
#pragma once

#include <cstdint>
#include <span>

namespace everstep {

// One CRC-32C per block of block_bytes bytes; the last block may be short.
// crcs.size() must be the number of blocks.
void crc32c_blocks(std::span<const uint8_t> data, int64_t block_bytes, std::span<uint32_t> crcs,
                   int64_t threads);

struct Placement {
    int64_t offset_bytes;                    // of the element with index 0 in every dimension
    std::span<const int64_t> strides_bytes;  // one per dimension
};

// Copies a box of `shape` elements. dst and src must not overlap; elements of dst neither, elements
// of src may (strides of zero).
void copy_box(std::span<uint8_t> dst, const Placement& dst_at, std::span<const uint8_t> src,
              const Placement& src_at, std::span<const int64_t> shape, int64_t item_bytes,
              int64_t threads);

// A stream of bytes cut into blocks, each with a CRC-32C that grows with the stream.
struct BlockStream {
    int64_t position_bytes;  // of the first byte that the call checksums
    int64_t block_bytes;
    std::span<uint32_t> crcs;  // crcs[i] belongs to block i of the stream, 0 before its first byte
};

// Copies bytes [range_begin, range_end) of the C-order flattening of a box of src to
// dst[dst_offset_bytes ...] and extends the CRC of every block they fall into.
void gather_box_crc(std::span<uint8_t> dst, int64_t dst_offset_bytes, std::span<const uint8_t> src,
                    const Placement& src_at, std::span<const int64_t> shape, int64_t item_bytes,
                    int64_t range_begin, int64_t range_end, const BlockStream& stream,
                    int64_t threads);

// Copies a box as copy_box does, and extends the CRC of every block that bytes
// [range_begin, range_end) of src fall into, whether or not they belong to the box: in one pass
// where the box can be copied in the order of src. Bytes of the box outside of the range are only
// copied.
void scatter_box_crc(std::span<uint8_t> dst, const Placement& dst_at, std::span<const uint8_t> src,
                     const Placement& src_at, std::span<const int64_t> shape, int64_t item_bytes,
                     int64_t range_begin, int64_t range_end, const BlockStream& stream,
                     int64_t threads);

}  // namespace everstep
