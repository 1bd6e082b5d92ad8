// Copies boxes out of a stream of bytes and checksums the stream in the same pass.
#include <algorithm>
#include <cstdlib>
#include <string>

#include "box.h"
#include "copy.h"
#include "copy_common.h"
#include "dispatch.h"
#include "parallel.h"

namespace everstep {
namespace {

// Rows from here on are checksummed while they are copied. Shorter ones are copied out of a piece
// of the stream that its checksum has just brought into the first-level cache.
constexpr int64_t kFusedRowBytes = 3 << 10;
constexpr int64_t kPieceBytes = 4 << 10;
// Rows shorter than this are written faster in the order of dst than in that of src.
constexpr int64_t kScatteredRowBytes = 64;

// Whether the runs are short and lie far from each other in dst in the order of the pair.
bool scattered(const BoxPair& box) {
    if (box.dims.empty() || box.run_bytes >= kScatteredRowBytes) return false;
    const int64_t step = std::abs(box.dims.back().dst_stride);
    return std::any_of(box.dims.begin(), box.dims.end(),
                       [step](const Dim& dim) { return std::abs(dim.dst_stride) < step; });
}

// Walks src once: checksums it, and copies what of the box lies there. The box ascends in src.
class Scatterer {
  public:
    // Byte `done` of the box is the first to copy, byte `at` of src (from the first byte of the
    // box on) the first to checksum; the box has no byte between the two that is not to be copied.
    Scatterer(uint8_t* dst_first, const uint8_t* src_first, const BoxPair& box, int64_t done,
              int64_t at)
        : dst_(dst_first),
          src_(src_first),
          box_(box),
          fused_(box.dims.empty() || box.run_bytes >= kFusedRowBytes),
          streaming_(streams(box.total_bytes) && box.run_bytes >= kStreamingRowBytes),
          cursor_(box, done),
          done_(done),
          at_(at) {}

    // Checksums until byte `end` of src, and copies on the way.
    uint32_t extend(uint32_t crc, int64_t end) {
        return fused_ ? extend_by_rows(crc, end) : extend_by_pieces(crc, end);
    }

    // Copies what is left before byte `end` of the box.
    void finish(int64_t end) {
        copy_until(end);
        if (streaming_) kernels().streaming_fence();
    }

  private:
    uint32_t checksum(uint32_t crc, int64_t end) {
        if (at_ >= end) return crc;
        crc = kernels().crc32c(crc, src_ + at_, static_cast<size_t>(end - at_));
        at_ = end;
        return crc;
    }

    void copy_until(int64_t end) {
        while (done_ < end) {
            const Rows rows = cursor_.next(end - done_);
            done_ += rows.bytes();
            if (!streaming_) {
                copy_rows(dst_, src_, rows);
                continue;
            }
            for (int64_t row = 0; row < rows.count; ++row) {
                uint8_t* dst = dst_ + (rows.dst + row * rows.dst_stride);
                kernels().streaming_copy(dst, row_of(rows, row, src_));
            }
        }
    }

    uint32_t extend_by_rows(uint32_t crc, int64_t end) {
        copy_until(bytes_before(box_, at_));
        for (const int64_t until = bytes_before(box_, end); done_ < until;) {
            const Rows rows = cursor_.next(until - done_);
            done_ += rows.bytes();
            for (int64_t row = 0; row < rows.count; ++row) {
                const int64_t begin = rows.src + row * rows.src_stride;
                crc = checksum(crc, begin);
                uint8_t* dst = dst_ + (rows.dst + row * rows.dst_stride);
                const Row from = row_of(rows, row, src_);
                crc = streaming_ ? kernels().streaming_copy_crc32c(crc, dst, from)
                                 : copy_crc32c(crc, dst, from);
                at_ = begin + rows.row_bytes;
            }
        }
        return checksum(crc, end);
    }

    // Rows are copied as soon as all of them is checksummed: cut ones cost more than they save.
    uint32_t extend_by_pieces(uint32_t crc, int64_t end) {
        while (at_ < end) {
            crc = checksum(crc, std::min(end, at_ + kPieceBytes));
            copy_until(bytes_before(box_, at_) / box_.run_bytes * box_.run_bytes);
        }
        return crc;
    }

    uint8_t* dst_;
    const uint8_t* src_;
    const BoxPair& box_;
    bool fused_;
    bool streaming_;
    Cursor cursor_;
    int64_t done_;
    int64_t at_;
};

}  // namespace

void scatter_box_crc(std::span<uint8_t> dst, const Placement& dst_at, std::span<const uint8_t> src,
                     const Placement& src_at, std::span<const int64_t> shape, int64_t item_bytes,
                     int64_t range_begin, int64_t range_end, const BlockStream& stream,
                     int64_t threads) {
    require_threads(threads);
    require_block_bytes(stream.block_bytes);
    const ByteRange dst_range = checked_range("dst", length(dst), dst_at.offset_bytes,
                                              dst_at.strides_bytes, shape, item_bytes);
    const ByteRange src_range = checked_range("src", length(src), src_at.offset_bytes,
                                              src_at.strides_bytes, shape, item_bytes);
    require_disjoint_elements("dst", dst_at.strides_bytes, shape, item_bytes);
    if (range_begin < 0 || range_begin > range_end || range_end > length(src)) {
        refuse("bytes " + std::to_string(range_begin) + " to " + std::to_string(range_end) +
               " are not a range of src of " + std::to_string(length(src)) + " bytes");
    }
    const int64_t bytes = range_end - range_begin;
    const BlockRange touched = checked_blocks(stream, bytes);
    require_separate(dst, dst_range, src, src_range);
    require_separate(dst, dst_range, src, {range_begin, range_end});

    const BoxPair box =
        make_box_pair(dst_at.strides_bytes, src_at.strides_bytes, shape, item_bytes, Order::kSrc);
    const bool one_pass =
        bytes != 0 && box.total_bytes != 0 && ascends_in_src(box) && !scattered(box);
    // All positions below are those in src, counted from the first byte of the box.
    const uint8_t* src_first = src.data() + src_at.offset_bytes;
    const int64_t range_at = range_begin - src_at.offset_bytes;
    const BoxPair nothing{{}, 0, 0};
    const int64_t parts = bytes == 0 ? 0 : std::min(touched.count, useful_threads(threads, bytes));
    const auto checksum_part = [&](int64_t part) {
        const BlockRange mine = touched.part(part, parts);
        const auto at_byte = [&](int64_t stream_byte) {
            return range_at + (stream_byte - stream.position_bytes);
        };
        const auto box_bytes_at = [&](int64_t edge) {
            if (!one_pass || edge == 0) return int64_t{0};
            if (edge == parts) return box.total_bytes;
            return bytes_before(box, at_byte(touched.part(edge, parts).first_byte(stream)));
        };
        Scatterer scatterer(dst.data() + dst_at.offset_bytes, src_first, one_pass ? box : nothing,
                            box_bytes_at(part), at_byte(mine.first_byte(stream)));
        for (int64_t block = mine.first; block < mine.end(); ++block) {
            const int64_t end =
                std::min((block + 1) * stream.block_bytes, stream.position_bytes + bytes);
            uint32_t& crc = stream.crcs[static_cast<size_t>(block)];
            crc = scatterer.extend(crc, at_byte(end));
        }
        scatterer.finish(box_bytes_at(part + 1));
    };
    if (parts > 0) run_parts(parts, checksum_part);
    if (!one_pass) copy_box(dst, dst_at, src, src_at, shape, item_bytes, threads);
}

}  // namespace everstep
