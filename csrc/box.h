// Boxes: n-dimensional strided regions of byte buffers, checked against the buffers' bounds and
// brought to the fewest dimensions; a cursor walks them in order.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace everstep {

inline constexpr size_t kMaxDims = 64;

// Bytes [begin, end) of a buffer.
struct ByteRange {
    int64_t begin;
    int64_t end;
};

// The bytes that a box can touch, counted from its element with index 0 in every dimension; empty
// for an empty box. Throws std::invalid_argument, naming the buffer, when the arguments make no
// sense.
ByteRange checked_reach(const char* buffer_name, std::span<const int64_t> strides_bytes,
                        std::span<const int64_t> shape, int64_t item_bytes);

// The bytes that a box can touch; empty for an empty box. Throws std::invalid_argument, naming the
// buffer, when the arguments make no sense or a byte would lie outside [0, buffer_bytes).
ByteRange checked_range(const char* buffer_name, int64_t buffer_bytes, int64_t offset_bytes,
                        std::span<const int64_t> strides_bytes, std::span<const int64_t> shape,
                        int64_t item_bytes);

// Product of the shape and the item size; throws std::invalid_argument past 2^63.
int64_t checked_box_bytes(std::span<const int64_t> shape, int64_t item_bytes);

// Throws std::invalid_argument when two elements of the box may share a byte.
void require_disjoint_elements(const char* buffer_name, std::span<const int64_t> strides_bytes,
                               std::span<const int64_t> shape, int64_t item_bytes);

struct Dim {
    int64_t extent;
    int64_t dst_stride;
    int64_t src_stride;
};

// A pair of boxes of equal shape. Offsets are from the first element; dims are outermost first and
// exclude the innermost run of bytes that is contiguous on both sides.
struct BoxPair {
    std::vector<Dim> dims;
    int64_t run_bytes;
    int64_t total_bytes;
};

// In which order a pair of boxes is visited: that of the shape, last dimension fastest, or the one
// in which the dimensions lie in memory on a side.
enum class Order { kShape, kDst, kSrc };

BoxPair make_box_pair(std::span<const int64_t> dst_strides_bytes,
                      std::span<const int64_t> src_strides_bytes, std::span<const int64_t> shape,
                      int64_t item_bytes, Order order);

// Whether the runs of the box follow each other in src, none of them before the end of another.
bool ascends_in_src(const BoxPair& box);

// How many bytes of a box that ascends in src lie before the byte of src that is src_bytes behind
// the first one.
int64_t bytes_before(const BoxPair& box, int64_t src_bytes);

// `count` rows of `row_bytes` contiguous bytes each.
struct Rows {
    int64_t dst;
    int64_t src;
    int64_t dst_stride;
    int64_t src_stride;
    int64_t count;
    int64_t row_bytes;

    int64_t bytes() const { return count * row_bytes; }
};

// Walks the bytes of a pair of boxes in order, from any byte on.
class Cursor {
  public:
    Cursor(const BoxPair& box, int64_t begin_byte);

    // The next at most max_bytes bytes (at least one), as many as form equal rows. Precondition:
    // max_bytes > 0 and not at the end.
    Rows next(int64_t max_bytes);

  private:
    void advance_runs(int64_t runs);

    const BoxPair& box_;
    std::array<int64_t, kMaxDims> index_{};
    int64_t dst_ = 0;
    int64_t src_ = 0;
    int64_t in_run_ = 0;
};

// Copies rows between two base addresses through the caches.
void copy_rows(uint8_t* dst_base, const uint8_t* src_base, const Rows& rows);

}  // namespace everstep
