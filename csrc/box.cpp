#include "box.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace everstep {
namespace {

[[noreturn]] void refuse(const std::string& message) {
    throw std::invalid_argument(message);
}

int64_t magnitude(int64_t stride) {
    return stride < 0 ? -stride : stride;
}

template <size_t kBytes>
void copy_items(uint8_t* dst, int64_t dst_stride, const uint8_t* src, int64_t src_stride,
                int64_t count) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < count; ++i) {
        std::memcpy(dst + i * dst_stride, src + i * src_stride, kBytes);
    }
}

template <size_t kBytes>
void copy_items_of(uint8_t* dst, const uint8_t* src, const Rows& rows) {
    // The stride as a constant lets the compiler use wide stores for the usual gather.
    if (rows.dst_stride == static_cast<int64_t>(kBytes)) {
        copy_items<kBytes>(dst, kBytes, src, rows.src_stride, rows.count);
    } else if (rows.src_stride == static_cast<int64_t>(kBytes)) {
        copy_items<kBytes>(dst, rows.dst_stride, src, kBytes, rows.count);
    } else {
        copy_items<kBytes>(dst, rows.dst_stride, src, rows.src_stride, rows.count);
    }
}

void merge_dims(BoxPair& box) {
    auto& dims = box.dims;
    while (!dims.empty() && dims.back().dst_stride == box.run_bytes &&
           dims.back().src_stride == box.run_bytes) {
        box.run_bytes *= dims.back().extent;
        dims.pop_back();
    }
    for (size_t inner = dims.size(); inner-- > 1;) {
        Dim& outer_dim = dims[inner - 1];
        const Dim& inner_dim = dims[inner];
        if (outer_dim.dst_stride == inner_dim.dst_stride * inner_dim.extent &&
            outer_dim.src_stride == inner_dim.src_stride * inner_dim.extent) {
            outer_dim = {outer_dim.extent * inner_dim.extent, inner_dim.dst_stride,
                         inner_dim.src_stride};
            dims.erase(dims.begin() + static_cast<std::ptrdiff_t>(inner));
        }
    }
}

}  // namespace

int64_t checked_box_bytes(std::span<const int64_t> shape, int64_t item_bytes) {
    if (item_bytes < 1) {
        refuse("item_bytes is " + std::to_string(item_bytes) + "; expected at least 1");
    }
    if (shape.size() > kMaxDims) {
        refuse("the box has " + std::to_string(shape.size()) + " dimensions; at most " +
               std::to_string(kMaxDims) + " are supported");
    }
    bool empty = false;
    for (const int64_t extent : shape) {
        if (extent < 0) refuse("the shape holds " + std::to_string(extent) + "; expected >= 0");
        empty = empty || extent == 0;
    }
    if (empty) return 0;
    int64_t bytes = item_bytes;
    for (const int64_t extent : shape) {
        if (__builtin_mul_overflow(bytes, extent, &bytes)) {
            refuse("the box has more than 2^63 bytes");
        }
    }
    return bytes;
}

ByteRange checked_reach(const char* buffer_name, std::span<const int64_t> strides_bytes,
                        std::span<const int64_t> shape, int64_t item_bytes) {
    const std::string name = buffer_name;
    if (strides_bytes.size() != shape.size()) {
        refuse(name + " has " + std::to_string(strides_bytes.size()) + " strides for " +
               std::to_string(shape.size()) + " dimensions");
    }
    if (checked_box_bytes(shape, item_bytes) == 0) return {0, 0};
    int64_t lowest = 0;
    int64_t highest = item_bytes;
    bool overflow = false;
    for (size_t dim = 0; dim < shape.size(); ++dim) {
        int64_t reach = 0;
        overflow |= __builtin_mul_overflow(strides_bytes[dim], shape[dim] - 1, &reach);
        int64_t& bound = reach < 0 ? lowest : highest;
        overflow |= __builtin_add_overflow(bound, reach, &bound);
    }
    if (overflow) refuse("the box reaches more than 2^63 bytes in " + name);
    return {lowest, highest};
}

ByteRange checked_range(const char* buffer_name, int64_t buffer_bytes, int64_t offset_bytes,
                        std::span<const int64_t> strides_bytes, std::span<const int64_t> shape,
                        int64_t item_bytes) {
    const std::string name = buffer_name;
    if (offset_bytes < 0 || offset_bytes > buffer_bytes) {
        refuse("the offset " + std::to_string(offset_bytes) + " is outside " + name + " of " +
               std::to_string(buffer_bytes) + " bytes");
    }
    const ByteRange reach = checked_reach(buffer_name, strides_bytes, shape, item_bytes);
    if (reach.begin == reach.end) return {offset_bytes, offset_bytes};
    int64_t lowest = 0;
    int64_t highest = 0;
    if (__builtin_add_overflow(offset_bytes, reach.begin, &lowest) ||
        __builtin_add_overflow(offset_bytes, reach.end, &highest)) {
        refuse("the box reaches more than 2^63 bytes in " + name);
    }
    if (lowest < 0 || highest > buffer_bytes) {
        refuse("the box needs bytes " + std::to_string(lowest) + " to " + std::to_string(highest) +
               " of " + name + ", which has " + std::to_string(buffer_bytes) + " bytes");
    }
    return {lowest, highest};
}

void require_disjoint_elements(const char* buffer_name, std::span<const int64_t> strides_bytes,
                               std::span<const int64_t> shape, int64_t item_bytes) {
    if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return;
    std::vector<std::pair<int64_t, int64_t>> dims;
    for (size_t dim = 0; dim < shape.size(); ++dim) {
        if (shape[dim] > 1) dims.emplace_back(magnitude(strides_bytes[dim]), shape[dim]);
    }
    std::sort(dims.begin(), dims.end());
    int64_t span_bytes = item_bytes;
    for (const auto& [stride, extent] : dims) {
        if (stride < span_bytes) {
            refuse(std::string("elements of ") + buffer_name + " overlap: a stride of " +
                   std::to_string(stride) + " bytes steps over " + std::to_string(span_bytes) +
                   " bytes");
        }
        span_bytes += stride * (extent - 1);
    }
}

BoxPair make_box_pair(std::span<const int64_t> dst_strides_bytes,
                      std::span<const int64_t> src_strides_bytes, std::span<const int64_t> shape,
                      int64_t item_bytes, Order order) {
    BoxPair box{{}, item_bytes, checked_box_bytes(shape, item_bytes)};
    if (box.total_bytes == 0) return box;
    for (size_t dim = 0; dim < shape.size(); ++dim) {
        if (shape[dim] == 1) continue;
        box.dims.push_back({shape[dim], dst_strides_bytes[dim], src_strides_bytes[dim]});
    }
    if (order != Order::kShape) {
        const auto stride = order == Order::kDst ? &Dim::dst_stride : &Dim::src_stride;
        std::stable_sort(box.dims.begin(), box.dims.end(), [stride](const Dim& a, const Dim& b) {
            return magnitude(a.*stride) > magnitude(b.*stride);
        });
    }
    merge_dims(box);
    return box;
}

bool ascends_in_src(const BoxPair& box) {
    int64_t span_bytes = box.run_bytes;
    for (size_t dim = box.dims.size(); dim-- > 0;) {
        if (box.dims[dim].src_stride < span_bytes) return false;
        span_bytes += box.dims[dim].src_stride * (box.dims[dim].extent - 1);
    }
    return true;
}

int64_t bytes_before(const BoxPair& box, int64_t src_bytes) {
    if (src_bytes <= 0) return 0;
    int64_t found = 0;
    int64_t within = box.total_bytes;  // of the dimensions that are not inside of this one
    for (const Dim& dim : box.dims) {
        const int64_t index = src_bytes / dim.src_stride;
        if (index >= dim.extent) return found + within;
        within /= dim.extent;
        found += index * within;
        src_bytes -= index * dim.src_stride;
    }
    return found + std::min(src_bytes, box.run_bytes);
}

Cursor::Cursor(const BoxPair& box, int64_t begin_byte) : box_(box) {
    if (begin_byte >= box.total_bytes) return;
    int64_t run = begin_byte / box.run_bytes;
    in_run_ = begin_byte % box.run_bytes;
    for (size_t dim = box.dims.size(); dim-- > 0;) {
        const Dim& at = box.dims[dim];
        index_[dim] = run % at.extent;
        run /= at.extent;
        dst_ += index_[dim] * at.dst_stride;
        src_ += index_[dim] * at.src_stride;
    }
}

Rows Cursor::next(int64_t max_bytes) {
    const int64_t left_in_run = box_.run_bytes - in_run_;
    if (in_run_ != 0 || max_bytes < left_in_run || box_.dims.empty()) {
        const int64_t bytes = std::min(max_bytes, left_in_run);
        const Rows rows{dst_ + in_run_, src_ + in_run_, 0, 0, 1, bytes};
        in_run_ += bytes;
        if (in_run_ == box_.run_bytes) {
            in_run_ = 0;
            advance_runs(1);
        }
        return rows;
    }
    const Dim& inner = box_.dims.back();
    const int64_t left_in_dim = inner.extent - index_[box_.dims.size() - 1];
    const int64_t count = std::min(max_bytes / box_.run_bytes, left_in_dim);
    const Rows rows{dst_, src_, inner.dst_stride, inner.src_stride, count, box_.run_bytes};
    advance_runs(count);
    return rows;
}

// Precondition: the runs stay within the innermost dimension.
void Cursor::advance_runs(int64_t runs) {
    for (size_t dim = box_.dims.size(); dim-- > 0;) {
        const Dim& at = box_.dims[dim];
        index_[dim] += runs;
        dst_ += runs * at.dst_stride;
        src_ += runs * at.src_stride;
        if (index_[dim] < at.extent) return;
        index_[dim] = 0;
        dst_ -= at.extent * at.dst_stride;
        src_ -= at.extent * at.src_stride;
        runs = 1;
    }
}

void copy_rows(uint8_t* dst_base, const uint8_t* src_base, const Rows& rows) {
    uint8_t* dst = dst_base + rows.dst;
    const uint8_t* src = src_base + rows.src;
    switch (rows.row_bytes) {
        case 1:
            return copy_items_of<1>(dst, src, rows);
        case 2:
            return copy_items_of<2>(dst, src, rows);
        case 4:
            return copy_items_of<4>(dst, src, rows);
        case 8:
            return copy_items_of<8>(dst, src, rows);
        case 16:
            return copy_items_of<16>(dst, src, rows);
        default:
            break;
    }
    for (int64_t i = 0; i < rows.count; ++i) {
        std::memcpy(dst + i * rows.dst_stride, src + i * rows.src_stride,
                    static_cast<size_t>(rows.row_bytes));
    }
}

}  // namespace everstep
