// What the functions of copy.h share: checks of arguments, and how rows are walked.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "box.h"
#include "copy.h"
#include "dispatch.h"

namespace everstep {

// Rows shorter than this are not worth the heads and tails of streaming stores.
inline constexpr int64_t kStreamingRowBytes = 1 << 10;

[[noreturn]] inline void refuse(const std::string& message) {
    throw std::invalid_argument(message);
}

inline void require_threads(int64_t threads) {
    if (threads < 1) refuse("threads is " + std::to_string(threads) + "; expected at least 1");
}

inline void require_block_bytes(int64_t block_bytes) {
    if (block_bytes < 1) {
        refuse("block_bytes is " + std::to_string(block_bytes) + "; expected at least 1");
    }
}

inline int64_t length(std::span<const uint8_t> buffer) {
    return static_cast<int64_t>(buffer.size());
}

inline void require_separate(std::span<const uint8_t> dst, const ByteRange& dst_range,
                             std::span<const uint8_t> src, const ByteRange& src_range) {
    const auto dst_base = reinterpret_cast<uintptr_t>(dst.data());
    const auto src_base = reinterpret_cast<uintptr_t>(src.data());
    if (dst_range.begin == dst_range.end || src_range.begin == src_range.end) return;
    if (dst_base + static_cast<uintptr_t>(dst_range.begin) <
            src_base + static_cast<uintptr_t>(src_range.end) &&
        src_base + static_cast<uintptr_t>(src_range.begin) <
            dst_base + static_cast<uintptr_t>(dst_range.end)) {
        refuse("dst and src overlap in memory; copy through a third buffer");
    }
}

// `count` blocks of a stream, from block `first` on.
struct BlockRange {
    int64_t first;
    int64_t count;

    int64_t end() const { return first + count; }

    // Part `part` of `parts`: all of them together are the whole.
    BlockRange part(int64_t part, int64_t parts) const {
        const int64_t begin = count * part / parts;
        return {first + begin, count * (part + 1) / parts - begin};
    }

    // Where the bytes of these blocks begin in the stream.
    int64_t first_byte(const BlockStream& stream) const {
        return std::max(stream.position_bytes, first * stream.block_bytes);
    }
};

// The blocks that the next `bytes` bytes of a stream fall into; throws std::invalid_argument where
// the stream has no room for them.
inline BlockRange checked_blocks(const BlockStream& stream, int64_t bytes) {
    int64_t end = 0;
    if (stream.position_bytes < 0 || __builtin_add_overflow(stream.position_bytes, bytes, &end)) {
        refuse("the stream position " + std::to_string(stream.position_bytes) + " is out of range");
    }
    const int64_t first = stream.position_bytes / stream.block_bytes;
    if (bytes == 0) return {first, 0};
    const int64_t last = (end - 1) / stream.block_bytes;
    if (last >= static_cast<int64_t>(stream.crcs.size())) {
        refuse("the bytes end in block " + std::to_string(last) +
               " of the stream, but there is room for " + std::to_string(stream.crcs.size()) +
               " checksums");
    }
    return {first, last - first + 1};
}

// Jobs from this size on go around the caches where the machine can: they are parts of a state that
// is much larger than any cache, and nobody reads soon what they write. (Measured on jobs that are
// larger together: from 8 KiB on this is faster, twice as fast at 512 KiB.)
constexpr int64_t kStreamingBytes = 16 << 10;

inline bool streams(int64_t job_bytes) {
    return job_bytes >= kStreamingBytes;
}

// Row i of several; afterwards row i + 1 is read.
inline Row row_of(const Rows& rows, int64_t i, const uint8_t* src_base) {
    const uint8_t* data = src_base + (rows.src + i * rows.src_stride);
    const auto bytes = static_cast<size_t>(rows.row_bytes);
    return {data, bytes, i + 1 < rows.count ? data + rows.src_stride : data + bytes};
}

}  // namespace everstep
