#include "copy.h"

#include <algorithm>
#include <string>
#include <vector>

#include "box.h"
#include "copy_common.h"
#include "dispatch.h"
#include "gatherer.h"
#include "parallel.h"

namespace everstep {
namespace {

void copy_range(uint8_t* dst, const uint8_t* src, const BoxPair& box, int64_t begin, int64_t end) {
    const Kernels& chosen = kernels();
    const bool streaming = streams(box.total_bytes) && box.run_bytes >= kStreamingRowBytes;
    Cursor cursor(box, begin);
    for (int64_t at = begin; at < end;) {
        const Rows rows = cursor.next(end - at);
        at += rows.bytes();
        if (!streaming) {
            copy_rows(dst, src, rows);
            continue;
        }
        for (int64_t row = 0; row < rows.count; ++row) {
            chosen.streaming_copy(dst + (rows.dst + row * rows.dst_stride), row_of(rows, row, src));
        }
    }
    if (streaming) chosen.streaming_fence();
}

}  // namespace

void crc32c_blocks(std::span<const uint8_t> data, int64_t block_bytes, std::span<uint32_t> crcs,
                   int64_t threads) {
    require_block_bytes(block_bytes);
    require_threads(threads);
    const int64_t bytes = length(data);
    const int64_t blocks = bytes / block_bytes + (bytes % block_bytes != 0 ? 1 : 0);
    if (static_cast<int64_t>(crcs.size()) != blocks) {
        refuse("the data has " + std::to_string(blocks) + " blocks of " +
               std::to_string(block_bytes) + " bytes, but there is room for " +
               std::to_string(crcs.size()) + " checksums");
    }
    if (blocks == 0) return;
    const int64_t parts = std::min(blocks, useful_threads(threads, bytes));
    run_parts(parts, [&](int64_t part) {
        for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
            const int64_t begin = block * block_bytes;
            const int64_t end = std::min(bytes, begin + block_bytes);
            crcs[static_cast<size_t>(block)] =
                kernels().crc32c(0, data.data() + begin, static_cast<size_t>(end - begin));
        }
    });
}

void copy_box(std::span<uint8_t> dst, const Placement& dst_at, std::span<const uint8_t> src,
              const Placement& src_at, std::span<const int64_t> shape, int64_t item_bytes,
              int64_t threads) {
    require_threads(threads);
    const ByteRange dst_range = checked_range("dst", length(dst), dst_at.offset_bytes,
                                              dst_at.strides_bytes, shape, item_bytes);
    const ByteRange src_range = checked_range("src", length(src), src_at.offset_bytes,
                                              src_at.strides_bytes, shape, item_bytes);
    require_disjoint_elements("dst", dst_at.strides_bytes, shape, item_bytes);
    require_separate(dst, dst_range, src, src_range);
    const BoxPair box =
        make_box_pair(dst_at.strides_bytes, src_at.strides_bytes, shape, item_bytes, Order::kDst);
    if (box.total_bytes == 0) return;

    uint8_t* dst_first = dst.data() + dst_at.offset_bytes;
    const uint8_t* src_first = src.data() + src_at.offset_bytes;
    const int64_t parts = useful_threads(threads, box.total_bytes);
    // Parts end between rows, or between cache lines where rows are long.
    const int64_t grain = box.run_bytes < kStreamingRowBytes ? box.run_bytes : 64;
    const auto edge = [&](int64_t part) {
        return part == parts ? box.total_bytes : box.total_bytes / parts / grain * grain * part;
    };
    run_parts(parts, [&](int64_t part) {
        copy_range(dst_first, src_first, box, edge(part), edge(part + 1));
    });
}

void gather_box_crc(std::span<uint8_t> dst, int64_t dst_offset_bytes, std::span<const uint8_t> src,
                    const Placement& src_at, std::span<const int64_t> shape, int64_t item_bytes,
                    int64_t range_begin, int64_t range_end, const BlockStream& stream,
                    int64_t threads) {
    require_threads(threads);
    require_block_bytes(stream.block_bytes);
    const ByteRange src_range = checked_range("src", length(src), src_at.offset_bytes,
                                              src_at.strides_bytes, shape, item_bytes);
    const int64_t box_bytes = checked_box_bytes(shape, item_bytes);
    if (range_begin < 0 || range_begin > range_end || range_end > box_bytes) {
        refuse("bytes " + std::to_string(range_begin) + " to " + std::to_string(range_end) +
               " are not a range of the box of " + std::to_string(box_bytes) + " bytes");
    }
    const int64_t bytes = range_end - range_begin;
    if (dst_offset_bytes < 0 || dst_offset_bytes > length(dst) ||
        bytes > length(dst) - dst_offset_bytes) {
        refuse(std::to_string(bytes) + " bytes at offset " + std::to_string(dst_offset_bytes) +
               " do not fit into dst of " + std::to_string(length(dst)) + " bytes");
    }
    const BlockRange touched = checked_blocks(stream, bytes);
    if (bytes == 0) return;
    require_separate(dst, {dst_offset_bytes, dst_offset_bytes + bytes}, src, src_range);

    const std::vector<int64_t> dst_strides = contiguous_strides(shape, item_bytes);
    const BoxPair box =
        make_box_pair(dst_strides, src_at.strides_bytes, shape, item_bytes, Order::kShape);
    const uint8_t* src_first = src.data() + src_at.offset_bytes;
    const int64_t parts = std::min(touched.count, useful_threads(threads, bytes));
    run_parts(parts, [&](int64_t part) {
        const BlockRange mine = touched.part(part, parts);
        int64_t at = mine.first_byte(stream);
        Gatherer gatherer(dst.data(), dst_offset_bytes - range_begin, src_first, box,
                          range_begin + (at - stream.position_bytes), streams(bytes));
        for (int64_t block = mine.first; block < mine.end(); ++block) {
            const int64_t end =
                std::min((block + 1) * stream.block_bytes, stream.position_bytes + bytes);
            uint32_t& crc = stream.crcs[static_cast<size_t>(block)];
            crc = gatherer.extend(crc, end - at);
            at = end;
        }
        gatherer.finish();
    });
}

}  // namespace everstep
