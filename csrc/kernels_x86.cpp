#include "kernels_x86.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "crc32c.h"

#define EVERSTEP_SSE42 __attribute__((target("sse4.2,pclmul")))
#define EVERSTEP_AVX512 __attribute__((target("avx512f,vpclmulqdq,sse4.2,pclmul")))

namespace everstep {
namespace {

constexpr size_t kLineBytes = 64;

// Fetches `lines` cache lines at an offset of the row, or where the caller reads on after it.
template <size_t kLines>
inline void prefetch(const Row& row, size_t offset) {
    const uint8_t* from = offset < row.bytes ? row.data + offset : row.next + (offset - row.bytes);
    for (size_t line = 0; line < kLines; ++line) {
        _mm_prefetch(reinterpret_cast<const char*>(from + line * kLineBytes), _MM_HINT_T0);
    }
}

// Bytes to copy until dst starts a cache line, which streaming stores must fill whole.
size_t head_bytes(const uint8_t* dst, const Row& src) {
    return std::min(src.bytes, (0 - reinterpret_cast<uintptr_t>(dst)) % kLineBytes);
}

inline void stream_line(uint8_t* dst, const uint8_t* src) {
    const auto* from = reinterpret_cast<const __m128i*>(src);
    auto* to = reinterpret_cast<__m128i*>(dst);
    const __m128i a = _mm_loadu_si128(from);
    const __m128i b = _mm_loadu_si128(from + 1);
    const __m128i c = _mm_loadu_si128(from + 2);
    const __m128i d = _mm_loadu_si128(from + 3);
    _mm_stream_si128(to, a);
    _mm_stream_si128(to + 1, b);
    _mm_stream_si128(to + 2, c);
    _mm_stream_si128(to + 3, d);
}

// From here on a state is an unfinished CRC (not inverted).

EVERSTEP_SSE42 uint32_t extend_short(uint32_t state, const uint8_t* data, size_t bytes) {
    uint64_t wide = state;
    for (; bytes >= 8; bytes -= 8, data += 8)
        wide = _mm_crc32_u64(wide, load_u64(data));
    state = static_cast<uint32_t>(wide);
    for (; bytes != 0; --bytes, ++data)
        state = _mm_crc32_u8(state, *data);
    return state;
}

// state * x^(8 * kBytes): the state after kBytes zero bytes. The carry-less product of two
// 32-bit values, read as the next 64 message bits, is their product times x^33.
template <size_t kBytes>
EVERSTEP_SSE42 uint32_t shift_state(uint32_t state) {
    constexpr uint32_t kFactor = crc_power_of_x(8 * kBytes - 33);
    const __m128i product = _mm_clmulepi64_si128(_mm_cvtsi32_si128(static_cast<int>(state)),
                                                 _mm_cvtsi32_si128(static_cast<int>(kFactor)), 0);
    return static_cast<uint32_t>(
        _mm_crc32_u64(0, static_cast<uint64_t>(_mm_cvtsi128_si64(product))));
}

// Three neighbouring lanes at once, from offset `at` of the row on: the CRC instruction has a
// latency of three cycles and a throughput of one. The processor's own prefetcher follows three
// such streams badly, so the bytes ahead are fetched here, from front to back. With kCopy the
// lines are also streamed to dst + at, which starts a cache line.
constexpr size_t kLongLane = 1024;
constexpr size_t kShortLane = 128;
constexpr size_t kLanesAheadBytes = 3 * kLongLane;

template <size_t kLaneBytes, bool kCopy>
EVERSTEP_SSE42 uint32_t extend_three_lanes(uint32_t state, uint8_t* dst, const Row& row,
                                           size_t at) {
    uint64_t a = state;
    uint64_t b = 0;
    uint64_t c = 0;
    for (size_t line = 0; line < kLaneBytes; line += kLineBytes) {
        const size_t first = at + line;
        const size_t second = first + kLaneBytes;
        const size_t third = second + kLaneBytes;
        prefetch<3>(row, at + 3 * line + kLanesAheadBytes);
        if constexpr (kCopy) {
            stream_line(dst + first, row.data + first);
            stream_line(dst + second, row.data + second);
            stream_line(dst + third, row.data + third);
        }
        for (size_t word = 0; word < kLineBytes; word += 8) {
            a = _mm_crc32_u64(a, load_u64(row.data + first + word));
            b = _mm_crc32_u64(b, load_u64(row.data + second + word));
            c = _mm_crc32_u64(c, load_u64(row.data + third + word));
        }
    }
    return shift_state<2 * kLaneBytes>(static_cast<uint32_t>(a)) ^
           shift_state<kLaneBytes>(static_cast<uint32_t>(b)) ^ static_cast<uint32_t>(c);
}

template <bool kCopy>
EVERSTEP_SSE42 uint32_t extend_sse42(uint32_t state, uint8_t* dst, const Row& row) {
    size_t at = 0;
    if constexpr (kCopy) {
        at = head_bytes(dst, row);
        std::memcpy(dst, row.data, at);
        state = extend_short(state, row.data, at);
    }
    for (; row.bytes - at >= 3 * kLongLane; at += 3 * kLongLane) {
        state = extend_three_lanes<kLongLane, kCopy>(state, dst, row, at);
    }
    for (; row.bytes - at >= 3 * kShortLane; at += 3 * kShortLane) {
        state = extend_three_lanes<kShortLane, kCopy>(state, dst, row, at);
    }
    if constexpr (kCopy) std::memcpy(dst + at, row.data + at, row.bytes - at);
    return extend_short(state, row.data + at, row.bytes - at);
}

// Multipliers that move a 128-bit lane kBits further from the end of the message: the low half
// (earlier bytes, higher powers) by x^(kBits + 64), the high half by x^kBits; the product of two
// reflected 64-bit values carries one more factor x.
template <uint64_t kBits>
EVERSTEP_AVX512 inline __m512i fold_factors() {
    constexpr auto kLow = static_cast<int64_t>(uint64_t{crc_power_of_x(kBits + 63)} << 32);
    constexpr auto kHigh = static_cast<int64_t>(uint64_t{crc_power_of_x(kBits - 1)} << 32);
    return _mm512_set4_epi64(kHigh, kLow, kHigh, kLow);
}

EVERSTEP_AVX512 inline __m512i fold(__m512i value, __m512i factors, __m512i next) {
    constexpr int kXorOfThree = 0x96;
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(value, factors, 0x00),
                                     _mm512_clmulepi64_epi128(value, factors, 0x11), next,
                                     kXorOfThree);
}

// Carry-less folding (Gopal et al., "Fast CRC computation for generic polynomials using
// PCLMULQDQ", 2009) with four independent 512-bit accumulators; the CRC instruction reduces the
// last line.
template <bool kCopy>
EVERSTEP_AVX512 uint32_t extend_avx512(uint32_t state, uint8_t* dst, const Row& row) {
    constexpr size_t kLanes = 4;
    constexpr size_t kFoldBytes = kLanes * kLineBytes;
    constexpr size_t kAheadBytes = 4 * kFoldBytes;
    size_t at = 0;
    if constexpr (kCopy) {
        at = head_bytes(dst, row);
        std::memcpy(dst, row.data, at);
        state = extend_short(state, row.data, at);
    }
    if (row.bytes - at >= kFoldBytes) {
        const auto load = [&](size_t lane) EVERSTEP_AVX512 {
            const size_t offset = at + lane * kLineBytes;
            const __m512i line = _mm512_loadu_si512(row.data + offset);
            if constexpr (kCopy) {
                _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + offset), line);
            }
            return line;
        };
        __m512i acc[kLanes];
        for (size_t lane = 0; lane < kLanes; ++lane)
            acc[lane] = load(lane);
        const __m128i start = _mm_cvtsi32_si128(static_cast<int>(state));
        acc[0] = _mm512_xor_si512(acc[0], _mm512_zextsi128_si512(start));
        const __m512i far = fold_factors<8 * kFoldBytes>();
        for (at += kFoldBytes; row.bytes - at >= kFoldBytes; at += kFoldBytes) {
            prefetch<kLanes>(row, at + kAheadBytes);
            for (size_t lane = 0; lane < kLanes; ++lane)
                acc[lane] = fold(acc[lane], far, load(lane));
        }
        const __m512i near = fold_factors<8 * kLineBytes>();
        __m512i line = acc[0];
        for (size_t lane = 1; lane < kLanes; ++lane)
            line = fold(line, near, acc[lane]);
        alignas(kLineBytes) uint8_t rest[kLineBytes];
        _mm512_store_si512(rest, line);
        state = extend_short(0, rest, kLineBytes);
    }
    if constexpr (kCopy) std::memcpy(dst + at, row.data + at, row.bytes - at);
    return extend_short(state, row.data + at, row.bytes - at);
}

}  // namespace

uint32_t crc32c_sse42(uint32_t crc, const uint8_t* data, size_t bytes) {
    return ~extend_sse42<false>(~crc, nullptr, {data, bytes, data + bytes});
}

uint32_t streaming_copy_crc32c_sse42(uint32_t crc, uint8_t* dst, const Row& src) {
    return ~extend_sse42<true>(~crc, dst, src);
}

uint32_t crc32c_avx512(uint32_t crc, const uint8_t* data, size_t bytes) {
    return ~extend_avx512<false>(~crc, nullptr, {data, bytes, data + bytes});
}

uint32_t streaming_copy_crc32c_avx512(uint32_t crc, uint8_t* dst, const Row& src) {
    return ~extend_avx512<true>(~crc, dst, src);
}

void streaming_copy_sse2(uint8_t* dst, const Row& src) {
    constexpr size_t kStepLines = 4;
    constexpr size_t kStepBytes = kStepLines * kLineBytes;
    constexpr size_t kAheadBytes = 4 * kStepBytes;
    size_t at = head_bytes(dst, src);
    std::memcpy(dst, src.data, at);
    for (; src.bytes - at >= kStepBytes; at += kStepBytes) {
        prefetch<kStepLines>(src, at + kAheadBytes);
        for (size_t line = 0; line < kStepLines; ++line) {
            stream_line(dst + at + line * kLineBytes, src.data + at + line * kLineBytes);
        }
    }
    std::memcpy(dst + at, src.data + at, src.bytes - at);
}

void streaming_fence_sse2() {
    _mm_sfence();
}

}  // namespace everstep

#endif
