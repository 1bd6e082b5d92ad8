// Self-test of the kernels without Python: every implementation that this processor can run against
// plain loops, on seeded random input. Used under emulators and sanitizers.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "box.h"
#include "copier.h"
#include "copy.h"
#include "copy_plan.h"
#include "crc32c.h"
#include "dispatch.h"
#include "kernels_arm.h"
#include "kernels_x86.h"

namespace {

using everstep::Row;
using Bytes = std::vector<uint8_t>;

std::mt19937_64 generator(20240229);

int64_t random_between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

Bytes random_bytes(size_t count) {
    Bytes bytes(count);
    for (uint8_t& byte : bytes)
        byte = static_cast<uint8_t>(generator());
    return bytes;
}

void require(bool condition, const std::string& what) {
    if (condition) return;
    std::fprintf(stderr, "selftest: FAILED: %s\n", what.c_str());
    std::exit(1);
}

uint32_t crc_by_bits(uint32_t crc, std::span<const uint8_t> data) {
    uint32_t state = ~crc;
    for (const uint8_t byte : data) {
        state ^= byte;
        for (int bit = 0; bit < 8; ++bit) {
            state = (state >> 1) ^ ((state & 1u) ? everstep::kCrcPolynomial : 0u);
        }
    }
    return ~state;
}

struct Implementation {
    std::string name;
    uint32_t (*crc32c)(uint32_t crc, const uint8_t* data, size_t bytes);
    uint32_t (*copy_crc32c)(uint32_t crc, uint8_t* dst, const Row& src);
};

std::vector<Implementation> implementations() {
    const everstep::Kernels& chosen = everstep::kernels();
    std::vector<Implementation> found = {
        {std::string("chosen (") + chosen.crc32c_name + ")", chosen.crc32c,
         chosen.streaming_copy_crc32c},
        {"portable", everstep::crc32c_portable, everstep::copy_crc32c},
    };
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul")) {
        found.push_back({"sse4.2", everstep::crc32c_sse42, everstep::streaming_copy_crc32c_sse42});
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq")) {
            found.push_back(
                {"avx512", everstep::crc32c_avx512, everstep::streaming_copy_crc32c_avx512});
        }
    }
#endif
    return found;
}

void test_crc32c(const Implementation& tested) {
    const auto* digits = reinterpret_cast<const uint8_t*>("123456789");
    require(tested.crc32c(0, digits, 9) == 0xE3069283u, tested.name + ": known vector");
    const Bytes data = random_bytes(40'000);
    for (int round = 0; round < 300; ++round) {
        const int64_t bytes = random_between(0, round % 3 == 0 ? 20'000 : 700);
        const int64_t at = random_between(0, 130);
        const auto seed = static_cast<uint32_t>(generator());
        const std::span<const uint8_t> piece(data.data() + at, static_cast<size_t>(bytes));
        const uint32_t expected = crc_by_bits(seed, piece);
        require(tested.crc32c(seed, piece.data(), piece.size()) == expected,
                tested.name + ": CRC of " + std::to_string(bytes) + " bytes");
        const int64_t dst_at = random_between(0, 70);
        Bytes dst(piece.size() + 200, 0xA5);
        const Row row{piece.data(), piece.size(), data.data()};
        require(tested.copy_crc32c(seed, dst.data() + dst_at, row) == expected,
                tested.name + ": CRC while copying " + std::to_string(bytes) + " bytes");
        Bytes expected_dst(dst.size(), 0xA5);
        std::copy(piece.begin(), piece.end(), expected_dst.begin() + dst_at);
        require(dst == expected_dst, tested.name + ": bytes copied with their CRC");
    }
}

struct RandomBox {
    std::vector<int64_t> shape;
    std::vector<int64_t> src_strides;
    int64_t src_offset = 0;
    int64_t item_bytes = 1;
    Bytes src;
    Bytes flat;  // C order
};

RandomBox random_box(bool large) {
    constexpr int64_t kItemSizes[] = {1, 2, 3, 4, 8, 12, 16};
    RandomBox box;
    box.item_bytes = kItemSizes[random_between(0, std::ssize(kItemSizes) - 1)];
    const int64_t dims = random_between(large ? 1 : 0, 4);
    int64_t stride = box.item_bytes;
    int64_t low = 0;
    for (int64_t dim = 0; dim < dims; ++dim) {
        const int64_t extent = large && dim == 0 ? 400'000 : random_between(1, large ? 2 : 9);
        if (random_between(0, 2) == 0) stride += random_between(0, 2) * box.item_bytes;
        const int64_t sign = random_between(0, 4) == 0 ? -1 : 1;
        box.shape.insert(box.shape.begin(), extent);
        box.src_strides.insert(box.src_strides.begin(),
                               random_between(0, 7) == 0 ? 0 : sign * stride);
        if (box.src_strides.front() < 0) low += (extent - 1) * stride;
        stride *= extent;
    }
    box.src_offset = low + random_between(0, 5);
    box.src = random_bytes(static_cast<size_t>(2 * stride + box.src_offset + box.item_bytes));
    std::vector<int64_t> index(box.shape.size(), 0);
    for (bool more = true; more;) {
        int64_t at = box.src_offset;
        for (size_t dim = 0; dim < index.size(); ++dim)
            at += index[dim] * box.src_strides[dim];
        box.flat.insert(box.flat.end(), box.src.begin() + at,
                        box.src.begin() + at + box.item_bytes);
        more = false;
        for (size_t dim = index.size(); dim-- > 0 && !more;) {
            more = ++index[dim] < box.shape[dim];
            if (!more) index[dim] = 0;
        }
    }
    return box;
}

void test_gather(const RandomBox& box, int64_t threads) {
    const auto total = static_cast<int64_t>(box.flat.size());
    const int64_t begin = random_between(0, total / 2);
    const int64_t end = random_between(begin, total);
    const int64_t block_bytes = random_between(1, 1 + total / 2);
    const int64_t position = random_between(0, 3 * block_bytes);
    const int64_t dst_offset = random_between(0, 70);
    Bytes dst(static_cast<size_t>(total + 200), 0xA5);
    Bytes expected_dst = dst;
    std::copy(box.flat.begin() + begin, box.flat.begin() + end, expected_dst.begin() + dst_offset);
    std::vector<uint32_t> crcs(static_cast<size_t>((position + total) / block_bytes + 1), 7);
    std::vector<uint32_t> expected_crcs = crcs;
    for (int64_t at = begin; at < end;) {
        const int64_t in_stream = position + at - begin;
        const int64_t block = in_stream / block_bytes;
        const int64_t stop = std::min(end, at + (block + 1) * block_bytes - in_stream);
        uint32_t& crc = expected_crcs[static_cast<size_t>(block)];
        crc = everstep::crc32c_portable(crc, box.flat.data() + at, static_cast<size_t>(stop - at));
        at = stop;
    }
    everstep::gather_box_crc(dst, dst_offset, box.src, {box.src_offset, box.src_strides}, box.shape,
                             box.item_bytes, begin, end, {position, block_bytes, crcs}, threads);
    require(dst == expected_dst, "bytes of gather_box_crc");
    require(crcs == expected_crcs, "checksums of gather_box_crc");
}

// All of src is a stream that is checksummed in two calls; the box is copied by one of them into a
// C-ordered destination, whose dimensions are reversed in every other round.
void test_scatter(const RandomBox& box, bool reversed, int64_t threads) {
    const auto total = static_cast<int64_t>(box.src.size());
    const int64_t cut = random_between(0, total);
    const int64_t block_bytes = random_between(1, 1 + total / 2);
    const int64_t position = random_between(0, 3 * block_bytes);
    std::vector<int64_t> strides(box.shape.size());
    int64_t stride = box.item_bytes;
    for (size_t i = 0; i < strides.size(); ++i) {
        const size_t dim = reversed ? i : strides.size() - 1 - i;
        strides[dim] = stride;
        stride *= box.shape[dim];
    }
    Bytes dst(box.flat.size() + 70, 0xA5);
    Bytes expected_dst = dst;
    everstep::copy_box(expected_dst, {7, strides}, box.src, {box.src_offset, box.src_strides},
                       box.shape, box.item_bytes, 1);
    std::vector<uint32_t> crcs(static_cast<size_t>((position + total) / block_bytes + 1), 0);
    std::vector<uint32_t> expected_crcs = crcs;
    for (int64_t at = 0; at < total;) {
        const int64_t block = (position + at) / block_bytes;
        const int64_t stop = std::min(total, (block + 1) * block_bytes - position);
        expected_crcs[static_cast<size_t>(block)] =
            everstep::crc32c_portable(0, box.src.data() + at, static_cast<size_t>(stop - at));
        at = stop;
    }
    const std::vector<int64_t> none = {0};
    const std::vector<int64_t> one = {1};
    const bool first = random_between(0, 1) == 0;
    for (const bool front : {true, false}) {
        const int64_t begin = front ? 0 : cut;
        const everstep::BlockStream stream{position + begin, block_bytes, crcs};
        if (front == first) {
            everstep::scatter_box_crc(dst, {7, strides}, box.src, {box.src_offset, box.src_strides},
                                      box.shape, box.item_bytes, begin, front ? cut : total, stream,
                                      threads);
        } else {
            everstep::scatter_box_crc(dst, {0, one}, box.src, {0, one}, none, 1, begin,
                                      front ? cut : total, stream, threads);
        }
    }
    require(dst == expected_dst, "bytes of scatter_box_crc");
    require(crcs == expected_crcs, "checksums of scatter_box_crc");
}

void test_copy_box(const RandomBox& box, int64_t threads) {
    // A C-ordered destination with a gap after every innermost row, visited through copy_box.
    const int64_t inner = box.shape.empty() ? 1 : box.shape.back();
    const int64_t gap = random_between(0, 3);
    std::vector<int64_t> strides(box.shape.size());
    int64_t stride = inner * box.item_bytes + gap;
    for (size_t dim = strides.size(); dim-- > 0;) {
        if (dim + 1 == strides.size()) {
            strides[dim] = box.item_bytes;
        } else {
            strides[dim] = stride;
            stride *= box.shape[dim];
        }
    }
    const int64_t row_bytes = inner * box.item_bytes;
    const auto rows = static_cast<int64_t>(box.flat.size()) / row_bytes;
    Bytes dst(static_cast<size_t>(rows * (row_bytes + gap) + 64), 0xA5);
    Bytes expected = dst;
    for (int64_t row = 0; row < rows; ++row) {
        std::copy_n(box.flat.begin() + row * row_bytes, row_bytes,
                    expected.begin() + 9 + row * (row_bytes + gap));
    }
    everstep::copy_box(dst, {9, strides}, box.src, {box.src_offset, box.src_strides}, box.shape,
                       box.item_bytes, threads);
    require(dst == expected, "bytes of copy_box");
}

void test_refusals() {
    Bytes dst(64);
    const Bytes src(64);
    const std::vector<int64_t> strides = {8};
    const std::vector<int64_t> shape = {9};
    try {
        everstep::copy_box(dst, {0, strides}, src, {0, strides}, shape, 8, 1);
    } catch (const std::invalid_argument&) {
        return;
    }
    require(false, "a box outside its buffer is refused");
}

// Boxes that are copied by a pool while others help, change the pace, and now and then cancel. The
// sources are overwritten and freed as soon as the job says that it is over.
void test_copier(everstep::Copier& copier, int round) {
    std::vector<RandomBox> boxes;
    std::vector<everstep::Piece> pieces;
    std::vector<uint64_t> addresses;
    Bytes expected;
    for (int64_t left = random_between(0, 12); left > 0; --left) {
        boxes.push_back(random_box(round % 8 == 0 && left == 1));
        const RandomBox& box = boxes.back();
        pieces.push_back({std::ssize(expected), box.shape, box.src_strides, box.item_bytes});
        addresses.push_back(reinterpret_cast<uintptr_t>(box.src.data() + box.src_offset));
        expected.insert(expected.end(), box.flat.begin(), box.flat.end());
    }
    const int64_t block_bytes = random_between(1, 1 + std::ssize(expected) / 5);
    const auto plan =
        std::make_shared<const everstep::CopyPlan>(pieces, std::ssize(expected), block_bytes);
    Bytes dst(expected.size());
    std::vector<uint32_t> crcs(static_cast<size_t>(plan->blocks()));
    std::vector<uint32_t> expected_crcs(crcs.size());
    everstep::crc32c_blocks(expected, block_bytes, expected_crcs, 1);

    const bool paused = random_between(0, 3) == 0;
    const bool cancelled = random_between(0, 3) == 0;
    const auto job = copier.start(plan, addresses, dst, crcs,
                                  paused ? std::optional<double>(0.0) : std::nullopt);
    std::thread watcher([&job, paused, cancelled] {
        while (paused && !cancelled && job->copied_bytes() == 0 && !job->done())
            std::this_thread::yield();
        job->set_rate(1e9);
        if (cancelled) job->cancel();
        job->wait(60.0);
    });
    std::thread helper([&job] {
        try {
            job->help();
        } catch (const std::runtime_error&) {
            require(job->cancelled(), "only a cancelled job cannot be helped");
        }
    });
    if (cancelled) {
        job->cancel();
        for (RandomBox& box : boxes)
            std::fill(box.src.begin(), box.src.end(), uint8_t{0});
        const everstep::CopyStats stats = job->stats();
        require(stats.help_bytes + stats.background_bytes == job->copied_bytes(),
                "bytes of a cancelled job");
    } else {
        require(job->wait(600.0), "a job gets done");
        for (RandomBox& box : boxes)
            std::fill(box.src.begin(), box.src.end(), uint8_t{0});
    }
    if (job->done()) {
        require(dst == expected, "bytes of the copier");
        require(crcs == expected_crcs, "checksums of the copier");
        require(job->copied_bytes() == std::ssize(expected), "number of bytes of the copier");
    }
    helper.join();
    watcher.join();
}

}  // namespace

int main() {
    for (const Implementation& tested : implementations()) {
        test_crc32c(tested);
        std::printf("selftest: CRC-32C, %s: ok\n", tested.name.c_str());
    }
    for (int round = 0; round < 400; ++round) {
        const RandomBox box = random_box(false);
        test_gather(box, 1 + round % 2);
        test_copy_box(box, 1 + round % 2);
        test_scatter(box, round % 4 < 2, 1 + round % 2);
    }
    for (int round = 0; round < 6; ++round) {
        const RandomBox box = random_box(true);
        test_gather(box, 1 + round % 2);
        test_copy_box(box, 1 + round % 2);
        test_scatter(box, round % 4 < 2, 1 + round % 2);
    }
    test_refusals();
    std::printf("selftest: boxes: ok\n");
    for (int round = 0; round < 200; round += 25) {
        everstep::Copier copier(1 + round % 3, round % 20);
        for (int job = round; job < round + 25; ++job)
            test_copier(copier, job);
    }
    std::printf("selftest: copier: ok\n");
    return 0;
}
