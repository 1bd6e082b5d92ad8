// The byte-level kernels of this machine, chosen once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace everstep {

// Contiguous bytes to read, and where the caller reads on afterwards: a hint to fetch ahead, never
// dereferenced.
struct Row {
    const uint8_t* data;
    size_t bytes;
    const uint8_t* next;
};

struct Kernels {
    const char* crc32c_name;
    const char* streaming_copy_name;
    const char* streaming_copy_crc32c_name;

    uint32_t (*crc32c)(uint32_t crc, const uint8_t* data, size_t bytes);

    // Copies that go around the caches where the machine can (non-temporal stores); call
    // `streaming_fence` before another thread may read the bytes.
    void (*streaming_copy)(uint8_t* dst, const Row& src);
    uint32_t (*streaming_copy_crc32c)(uint32_t crc, uint8_t* dst, const Row& src);
    void (*streaming_fence)();
};

// Decided on the first call. In the environment, EVERSTEP_PORTABLE_KERNELS=1 forces portable code
// and EVERSTEP_AVX512_KERNELS=0 keeps AVX-512 unused.
const Kernels& kernels();

// Through the caches: checksum and copy of one piece after the other while it is hot.
uint32_t copy_crc32c(uint32_t crc, uint8_t* dst, const Row& src);

}  // namespace everstep
