#include "crc32c_x86.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "crc32c.h"

#define EVERSTEP_SSE42 __attribute__((target("sse4.2,pclmul")))
#define EVERSTEP_AVX512 __attribute__((target("avx512f,avx512vl,vpclmulqdq,sse4.2,pclmul")))

namespace everstep {
namespace {

constexpr size_t kLineBytes = 64;
constexpr size_t kPrefetchBytes = 1024;

size_t bytes_to_line(const uint8_t* pointer) {
    return (0 - reinterpret_cast<uintptr_t>(pointer)) % kLineBytes;
}

// Unfinished CRC (inverted) over a few bytes, one instruction per word.
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
// 32-bit values read as the next 64 message bits is their product times x^33.
template <size_t kBytes>
EVERSTEP_SSE42 uint32_t shift_state(uint32_t state) {
    constexpr uint32_t kFactor = crc_power_of_x(8 * kBytes - 33);
    const __m128i product = _mm_clmulepi64_si128(_mm_cvtsi32_si128(static_cast<int>(state)),
                                                 _mm_cvtsi32_si128(static_cast<int>(kFactor)), 0);
    return static_cast<uint32_t>(
        _mm_crc32_u64(0, static_cast<uint64_t>(_mm_cvtsi128_si64(product))));
}

EVERSTEP_SSE42 inline void stream_line(uint8_t* dst, const uint8_t* src) {
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

// Three neighbouring lanes of kLaneBytes at once: the CRC instruction has a latency of three
// cycles and a throughput of one. With kCopy the lines are also streamed to dst (64-aligned).
template <size_t kLaneBytes, bool kCopy>
EVERSTEP_SSE42 uint32_t extend_three_lanes(uint32_t state, uint8_t* dst, const uint8_t* src) {
    uint64_t a = state;
    uint64_t b = 0;
    uint64_t c = 0;
    for (size_t at = 0; at < kLaneBytes; at += kLineBytes) {
        const uint8_t* pa = src + at;
        const uint8_t* pb = pa + kLaneBytes;
        const uint8_t* pc = pb + kLaneBytes;
        if constexpr (kCopy) {
            _mm_prefetch(reinterpret_cast<const char*>(pa + 3 * kLaneBytes), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(pb + 3 * kLaneBytes), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(pc + 3 * kLaneBytes), _MM_HINT_T0);
            stream_line(dst + at, pa);
            stream_line(dst + at + kLaneBytes, pb);
            stream_line(dst + at + 2 * kLaneBytes, pc);
        }
        for (size_t word = 0; word < kLineBytes; word += 8) {
            a = _mm_crc32_u64(a, load_u64(pa + word));
            b = _mm_crc32_u64(b, load_u64(pb + word));
            c = _mm_crc32_u64(c, load_u64(pc + word));
        }
    }
    return shift_state<2 * kLaneBytes>(static_cast<uint32_t>(a)) ^
           shift_state<kLaneBytes>(static_cast<uint32_t>(b)) ^ static_cast<uint32_t>(c);
}

constexpr size_t kLongLane = 1024;
constexpr size_t kShortLane = 128;

EVERSTEP_SSE42 uint32_t extend_sse42(uint32_t state, const uint8_t* data, size_t bytes) {
    for (; bytes >= 3 * kLongLane; bytes -= 3 * kLongLane, data += 3 * kLongLane) {
        state = extend_three_lanes<kLongLane, false>(state, nullptr, data);
    }
    for (; bytes >= 3 * kShortLane; bytes -= 3 * kShortLane, data += 3 * kShortLane) {
        state = extend_three_lanes<kShortLane, false>(state, nullptr, data);
    }
    return extend_short(state, data, bytes);
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

constexpr size_t kFoldBytes = 4 * kLineBytes;

// Carry-less folding (Gopal et al., "Fast CRC computation for generic polynomials using
// PCLMULQDQ", 2009) with four independent 512-bit accumulators; the last 16 bytes are reduced by
// the CRC instruction. bytes: a multiple of 256, at least 256; dst 64-aligned.
template <bool kCopy>
EVERSTEP_AVX512 uint32_t extend_folding(uint32_t state, uint8_t* dst, const uint8_t* src,
                                        size_t bytes) {
    __m512i acc[4];
    for (size_t lane = 0; lane < 4; ++lane) {
        acc[lane] = _mm512_loadu_si512(src + lane * kLineBytes);
        if constexpr (kCopy) {
            _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + lane * kLineBytes), acc[lane]);
        }
    }
    acc[0] = _mm512_xor_si512(acc[0],
                              _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(state))));
    const __m512i far = fold_factors<8 * kFoldBytes>();
    for (size_t at = kFoldBytes; at < bytes; at += kFoldBytes) {
        for (size_t lane = 0; lane < 4; ++lane) {
            const uint8_t* from = src + at + lane * kLineBytes;
            const __m512i next = _mm512_loadu_si512(from);
            if constexpr (kCopy) {
                _mm_prefetch(reinterpret_cast<const char*>(from + kPrefetchBytes), _MM_HINT_T0);
                _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + at + lane * kLineBytes), next);
            }
            acc[lane] = fold(acc[lane], far, next);
        }
    }
    const __m512i near = fold_factors<8 * kLineBytes>();
    __m512i line = fold(acc[0], near, acc[1]);
    line = fold(line, near, acc[2]);
    line = fold(line, near, acc[3]);
    alignas(64) uint8_t rest[kLineBytes];
    _mm512_store_si512(rest, line);
    return extend_short(0, rest, kLineBytes);
}

}  // namespace

EVERSTEP_SSE42 uint32_t crc32c_sse42(uint32_t crc, const uint8_t* data, size_t bytes) {
    return ~extend_sse42(~crc, data, bytes);
}

EVERSTEP_SSE42 uint32_t streaming_copy_crc32c_sse42(uint32_t crc, uint8_t* dst, const uint8_t* src,
                                                    size_t bytes) {
    uint32_t state = ~crc;
    const size_t head = bytes_to_line(dst);
    if (bytes >= head + 3 * kShortLane) {
        std::memcpy(dst, src, head);
        state = extend_short(state, src, head);
        dst += head, src += head, bytes -= head;
        for (; bytes >= 3 * kLongLane; bytes -= 3 * kLongLane) {
            state = extend_three_lanes<kLongLane, true>(state, dst, src);
            dst += 3 * kLongLane, src += 3 * kLongLane;
        }
        for (; bytes >= 3 * kShortLane; bytes -= 3 * kShortLane) {
            state = extend_three_lanes<kShortLane, true>(state, dst, src);
            dst += 3 * kShortLane, src += 3 * kShortLane;
        }
    }
    std::memcpy(dst, src, bytes);
    return ~extend_short(state, src, bytes);
}

EVERSTEP_AVX512 uint32_t crc32c_avx512(uint32_t crc, const uint8_t* data, size_t bytes) {
    uint32_t state = ~crc;
    const size_t body = bytes - bytes % kFoldBytes;
    if (body != 0) state = extend_folding<false>(state, nullptr, data, body);
    return ~extend_short(state, data + body, bytes - body);
}

EVERSTEP_AVX512 uint32_t streaming_copy_crc32c_avx512(uint32_t crc, uint8_t* dst,
                                                      const uint8_t* src, size_t bytes) {
    uint32_t state = ~crc;
    const size_t head = bytes_to_line(dst);
    if (bytes >= head + kFoldBytes) {
        std::memcpy(dst, src, head);
        state = extend_short(state, src, head);
        dst += head, src += head, bytes -= head;
        const size_t body = bytes - bytes % kFoldBytes;
        state = extend_folding<true>(state, dst, src, body);
        dst += body, src += body, bytes -= body;
    }
    std::memcpy(dst, src, bytes);
    return ~extend_short(state, src, bytes);
}

void streaming_copy_sse2(uint8_t* dst, const uint8_t* src, size_t bytes) {
    const size_t head = bytes_to_line(dst);
    if (bytes >= head + kLineBytes) {
        std::memcpy(dst, src, head);
        dst += head, src += head, bytes -= head;
        for (; bytes >= kLineBytes; bytes -= kLineBytes, dst += kLineBytes, src += kLineBytes) {
            _mm_prefetch(reinterpret_cast<const char*>(src + kPrefetchBytes), _MM_HINT_T0);
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
    }
    std::memcpy(dst, src, bytes);
}

void streaming_fence_sse2() {
    _mm_sfence();
}

}  // namespace everstep

#endif
