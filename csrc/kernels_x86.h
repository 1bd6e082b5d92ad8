// CRC-32C and copies for x86-64; call only what the processor supports.
#pragma once

#if defined(__x86_64__)

#include <cstddef>
#include <cstdint>

#include "dispatch.h"

namespace everstep {

// Need SSE4.2 and PCLMULQDQ.
uint32_t crc32c_sse42(uint32_t crc, const uint8_t* data, size_t bytes);
uint32_t streaming_copy_crc32c_sse42(uint32_t crc, uint8_t* dst, const Row& src);

// Need AVX-512F and VPCLMULQDQ besides.
uint32_t crc32c_avx512(uint32_t crc, const uint8_t* data, size_t bytes);
uint32_t streaming_copy_crc32c_avx512(uint32_t crc, uint8_t* dst, const Row& src);

// Run on every x86-64.
void streaming_copy_sse2(uint8_t* dst, const Row& src);
void streaming_fence_sse2();

}  // namespace everstep

#endif
