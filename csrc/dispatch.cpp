#include "dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "crc32c.h"
#include "kernels_arm.h"
#include "kernels_x86.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace everstep {
namespace {

// Whether an environment variable is set to "0" (no) or to anything else (yes).
bool environment_says(const char* variable, bool otherwise) {
    const char* value = std::getenv(variable);
    if (value == nullptr || *value == '\0') return otherwise;
    return std::strcmp(value, "0") != 0;
}

void plain_copy(uint8_t* dst, const Row& src) {
    std::memcpy(dst, src.data, src.bytes);
}

void no_fence() {}

#if defined(__aarch64__)
bool arm_has_crc() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
#elif defined(__APPLE__)
    return true;
#else
    return false;
#endif
}
#endif

Kernels choose() {
    Kernels chosen{
        .crc32c_name = "portable",
        .streaming_copy_name = "portable",
        .streaming_copy_crc32c_name = "portable",
        .crc32c = crc32c_portable,
        .streaming_copy = plain_copy,
        .streaming_copy_crc32c = copy_crc32c,
        .streaming_fence = no_fence,
    };
    if (environment_says("EVERSTEP_PORTABLE_KERNELS", false)) return chosen;
#if defined(__x86_64__)
    chosen.streaming_copy_name = "sse2";
    chosen.streaming_copy = streaming_copy_sse2;
    chosen.streaming_fence = streaming_fence_sse2;
    __builtin_cpu_init();
    if (__builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul")) {
        chosen.crc32c_name = chosen.streaming_copy_crc32c_name = "sse4.2";
        chosen.crc32c = crc32c_sse42;
        chosen.streaming_copy_crc32c = streaming_copy_crc32c_sse42;
        if (environment_says("EVERSTEP_AVX512_KERNELS", true) &&
            __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq")) {
            chosen.crc32c_name = chosen.streaming_copy_crc32c_name = "avx512";
            chosen.crc32c = crc32c_avx512;
            chosen.streaming_copy_crc32c = streaming_copy_crc32c_avx512;
        }
    }
#elif defined(__aarch64__)
    if (arm_has_crc()) {
        chosen.crc32c_name = chosen.streaming_copy_crc32c_name = "armv8-crc";
        chosen.crc32c = crc32c_armv8;
    }
#endif
    return chosen;
}

}  // namespace

const Kernels& kernels() {
    static const Kernels chosen = choose();
    return chosen;
}

uint32_t copy_crc32c(uint32_t crc, uint8_t* dst, const Row& src) {
    constexpr size_t kPieceBytes = 8 << 10;
    const Kernels& chosen = kernels();
    for (size_t at = 0; at < src.bytes; at += kPieceBytes) {
        const size_t piece = std::min(src.bytes - at, kPieceBytes);
        crc = chosen.crc32c(crc, src.data + at, piece);
        std::memcpy(dst + at, src.data + at, piece);
    }
    return crc;
}

}  // namespace everstep
