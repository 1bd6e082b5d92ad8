// Python face of the kernels: everstep._native. Arguments are converted and the interpreter lock is
// released here; everything else is in copy.cpp. The copier is in module_copier.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <vector>

#include "copy.h"
#include "crc32c.h"
#include "dispatch.h"
#include "module_copier.h"
#include "pages.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

using Source = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Target = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Checksums = nb::ndarray<uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Integers = std::vector<int64_t>;

std::span<const uint8_t> bytes_of(const Source& source) {
    return {source.data(), source.size()};
}

std::span<uint8_t> bytes_of(const Target& target) {
    return {target.data(), target.size()};
}

std::span<uint32_t> values_of(const Checksums& checksums) {
    return {checksums.data(), checksums.size()};
}

uint32_t crc32c(const Source& data, uint32_t seed) {
    const nb::gil_scoped_release unlocked;
    return everstep::kernels().crc32c(seed, data.data(), data.size());
}

void crc32c_blocks(const Source& data, int64_t block_bytes, const Checksums& out, int64_t threads) {
    const nb::gil_scoped_release unlocked;
    everstep::crc32c_blocks(bytes_of(data), block_bytes, values_of(out), threads);
}

void copy_box(const Target& dst, int64_t dst_offset_bytes, const Integers& dst_strides_bytes,
              const Source& src, int64_t src_offset_bytes, const Integers& src_strides_bytes,
              const Integers& shape, int64_t item_bytes, int64_t threads) {
    const nb::gil_scoped_release unlocked;
    everstep::copy_box(bytes_of(dst), {dst_offset_bytes, dst_strides_bytes}, bytes_of(src),
                       {src_offset_bytes, src_strides_bytes}, shape, item_bytes, threads);
}

void gather_box_crc(const Target& dst, int64_t dst_offset_bytes, const Source& src,
                    int64_t src_offset_bytes, const Integers& src_strides_bytes,
                    const Integers& shape, int64_t item_bytes, int64_t begin_bytes,
                    int64_t end_bytes, int64_t stream_offset_bytes, int64_t block_bytes,
                    const Checksums& block_crcs, int64_t threads) {
    const nb::gil_scoped_release unlocked;
    everstep::gather_box_crc(bytes_of(dst), dst_offset_bytes, bytes_of(src),
                             {src_offset_bytes, src_strides_bytes}, shape, item_bytes, begin_bytes,
                             end_bytes, {stream_offset_bytes, block_bytes, values_of(block_crcs)},
                             threads);
}

void scatter_box_crc(const Target& dst, int64_t dst_offset_bytes, const Integers& dst_strides_bytes,
                     const Source& src, int64_t src_offset_bytes, const Integers& src_strides_bytes,
                     const Integers& shape, int64_t item_bytes, int64_t begin_bytes,
                     int64_t end_bytes, int64_t stream_offset_bytes, int64_t block_bytes,
                     const Checksums& block_crcs, int64_t threads) {
    const nb::gil_scoped_release unlocked;
    everstep::scatter_box_crc(bytes_of(dst), {dst_offset_bytes, dst_strides_bytes}, bytes_of(src),
                              {src_offset_bytes, src_strides_bytes}, shape, item_bytes, begin_bytes,
                              end_bytes, {stream_offset_bytes, block_bytes, values_of(block_crcs)},
                              threads);
}

bool pages_missing(const Source& data) {
    const nb::gil_scoped_release unlocked;
    return everstep::pages_missing(bytes_of(data));
}

int populate_pages(const Source& data, bool told) {
    const nb::gil_scoped_release unlocked;
    return everstep::populate_pages(bytes_of(data), told);
}

nb::dict chosen_kernels() {
    const everstep::Kernels& chosen = everstep::kernels();
    nb::dict names;
    names["crc32c"] = chosen.crc32c_name;
    names["streaming_copy"] = chosen.streaming_copy_name;
    names["streaming_copy_crc32c"] = chosen.streaming_copy_crc32c_name;
    return names;
}

}  // namespace

NB_MODULE(_native, module) {
    nb::set_leak_warnings(false);
    everstep::kernels();  // the choice is made at import
    module.doc() = "Native kernels of everstep; use everstep.checkpoint.kernels.";
    module.def("kernels", &chosen_kernels);
    module.def("crc32c", &crc32c, "data"_a.noconvert(), "seed"_a = 0);
    module.def("crc32c_combine", &everstep::crc32c_combine, "crc_a"_a, "crc_b"_a, "bytes_b"_a);
    module.def("crc32c_blocks", &crc32c_blocks, "data"_a.noconvert(), "block_bytes"_a,
               "out"_a.noconvert(), "threads"_a = 1);
    module.def("copy_box", &copy_box, "dst"_a.noconvert(), "dst_offset_bytes"_a,
               "dst_strides_bytes"_a, "src"_a.noconvert(), "src_offset_bytes"_a,
               "src_strides_bytes"_a, "shape"_a, "item_bytes"_a, "threads"_a = 1);
    module.def("gather_box_crc", &gather_box_crc, "dst"_a.noconvert(), "dst_offset_bytes"_a,
               "src"_a.noconvert(), "src_offset_bytes"_a, "src_strides_bytes"_a, "shape"_a,
               "item_bytes"_a, "begin_bytes"_a, "end_bytes"_a, "stream_offset_bytes"_a,
               "block_bytes"_a, "block_crcs"_a.noconvert(), "threads"_a = 1);
    module.def("scatter_box_crc", &scatter_box_crc, "dst"_a.noconvert(), "dst_offset_bytes"_a,
               "dst_strides_bytes"_a, "src"_a.noconvert(), "src_offset_bytes"_a,
               "src_strides_bytes"_a, "shape"_a, "item_bytes"_a, "begin_bytes"_a, "end_bytes"_a,
               "stream_offset_bytes"_a, "block_bytes"_a, "block_crcs"_a.noconvert(),
               "threads"_a = 1);
    module.def("pages_missing", &pages_missing, "data"_a.noconvert());
    module.def("populate_pages", &populate_pages, "data"_a.noconvert(), "told"_a);
    everstep::add_copier(module);
}
