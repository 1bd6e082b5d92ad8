// CRC-32C for AArch64 with the CRC instructions; call only where the processor has them.
#pragma once

#if defined(__aarch64__)

#include <cstddef>
#include <cstdint>

namespace everstep {

uint32_t crc32c_armv8(uint32_t crc, const uint8_t* data, size_t bytes);

}  // namespace everstep

#endif
