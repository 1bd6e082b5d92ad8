// The inner loop of every gather: bytes of a strided box to contiguous memory, with their CRC.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "box.h"
#include "copy_common.h"
#include "dispatch.h"

namespace everstep {

// Strides of a box in C order without gaps.
inline std::vector<int64_t> contiguous_strides(std::span<const int64_t> shape, int64_t item_bytes) {
    std::vector<int64_t> strides(shape.size());
    int64_t stride = item_bytes;
    for (size_t dim = shape.size(); dim-- > 0;) {
        strides[dim] = stride;
        stride *= shape[dim];
    }
    return strides;
}

// Copies the bytes of a box in order to contiguous memory and checksums them on the way.
class Gatherer {
  public:
    // dst[dst_shift + i] receives byte i of the flattening.
    Gatherer(uint8_t* dst, int64_t dst_shift, const uint8_t* src, const BoxPair& box, int64_t begin,
             bool streaming)
        : dst_(dst),
          dst_shift_(dst_shift),
          src_(src),
          long_rows_(box.dims.empty() || box.run_bytes >= kStreamingRowBytes),
          streaming_(streaming),
          cursor_(box, begin) {}

    uint32_t extend(uint32_t crc, int64_t bytes) {
        return long_rows_ ? extend_by_rows(crc, bytes) : extend_by_pieces(crc, bytes);
    }

    void finish() {
        if (streaming_) kernels().streaming_fence();
    }

  private:
    // Short rows are collected in pieces that stay in the first-level cache.
    static constexpr int64_t kPieceBytes = 8 << 10;

    uint32_t extend_by_rows(uint32_t crc, int64_t bytes) {
        while (bytes > 0) {
            const Rows rows = cursor_.next(bytes);
            bytes -= rows.bytes();
            for (int64_t row = 0; row < rows.count; ++row) {
                uint8_t* dst = dst_ + (dst_shift_ + rows.dst + row * rows.dst_stride);
                const Row from = row_of(rows, row, src_);
                crc = streaming_ ? kernels().streaming_copy_crc32c(crc, dst, from)
                                 : copy_crc32c(crc, dst, from);
            }
        }
        return crc;
    }

    // A piece is collected in place, or beside it when the bytes then go around the caches.
    uint32_t extend_by_pieces(uint32_t crc, int64_t bytes) {
        alignas(64) uint8_t beside[kPieceBytes];
        while (bytes > 0) {
            const int64_t piece_bytes = std::min(bytes, kPieceBytes);
            int64_t piece_begin = 0;
            for (int64_t filled = 0; filled < piece_bytes;) {
                Rows rows = cursor_.next(piece_bytes - filled);
                if (filled == 0) piece_begin = dst_shift_ + rows.dst;
                rows.dst = filled;
                copy_rows(streaming_ ? beside : dst_ + piece_begin, src_, rows);
                filled += rows.bytes();
            }
            const auto count = static_cast<size_t>(piece_bytes);
            if (streaming_) {
                const Row from{beside, count, beside};
                crc = kernels().streaming_copy_crc32c(crc, dst_ + piece_begin, from);
            } else {
                crc = kernels().crc32c(crc, dst_ + piece_begin, count);
            }
            bytes -= piece_bytes;
        }
        return crc;
    }

    uint8_t* dst_;
    int64_t dst_shift_;
    const uint8_t* src_;
    bool long_rows_;
    bool streaming_;
    Cursor cursor_;
};

}  // namespace everstep
