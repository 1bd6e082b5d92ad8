// The byte-level kernels of this machine, chosen once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace everstep {

struct Kernels {
    const char* crc32c_name;
    const char* streaming_copy_name;
    const char* streaming_copy_crc32c_name;

    uint32_t (*crc32c)(uint32_t crc, const uint8_t* data, size_t bytes);

    // Copies that go around the caches where the machine can (non-temporal stores); call
    // `streaming_fence` before another thread may read the bytes.
    void (*streaming_copy)(uint8_t* dst, const uint8_t* src, size_t bytes);
    uint32_t (*streaming_copy_crc32c)(uint32_t crc, uint8_t* dst, const uint8_t* src, size_t bytes);
    void (*streaming_fence)();

    // Copies of at least this size in one job go around the caches.
    size_t streaming_bytes;
};

// Decided on the first call. EVERSTEP_PORTABLE_KERNELS=1 in the environment forces portable code.
const Kernels& kernels();

// Through the caches: checksum and copy of one piece after the other while it is hot.
uint32_t copy_crc32c(uint32_t crc, uint8_t* dst, const uint8_t* src, size_t bytes);

}  // namespace everstep
