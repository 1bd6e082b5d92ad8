// CRC-32C (Castagnoli, reflected polynomial 0x82F63B78): arithmetic modulo the polynomial and the
// portable implementation. Hardware versions are in crc32c_x86.cpp and crc32c_arm.cpp.
//
// Convention everywhere: a CRC is the finished value (initial and final inversion included), 0 for
// no bytes, and every function continues from the CRC of the bytes before.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace everstep {

static_assert(std::endian::native == std::endian::little, "the kernels assume little-endian words");

inline constexpr uint32_t kCrcPolynomial = 0x82F63B78u;  // bit i is the coefficient of x^(31-i)
inline constexpr uint32_t kCrcOne = 0x80000000u;         // the polynomial 1

// a * b modulo the CRC polynomial.
constexpr uint32_t crc_multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (int bit = 31; bit >= 0; --bit) {
        if ((a >> bit) & 1u) product ^= b;
        b = (b >> 1) ^ ((b & 1u) ? kCrcPolynomial : 0u);
    }
    return product;
}

// x^exponent modulo the CRC polynomial.
constexpr uint32_t crc_power_of_x(uint64_t exponent) {
    uint32_t result = kCrcOne;
    uint32_t square = kCrcOne >> 1;
    for (; exponent != 0; exponent >>= 1) {
        if (exponent & 1u) result = crc_multiply(result, square);
        square = crc_multiply(square, square);
    }
    return result;
}

// CRC of A followed by B, from the CRCs of A and B and the length of B.
uint32_t crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t bytes_b);

// Slice-by-8: eight table lookups per 8 bytes.
uint32_t crc32c_portable(uint32_t crc, const uint8_t* data, size_t bytes);

inline uint64_t load_u64(const uint8_t* data) {
    uint64_t word;
    std::memcpy(&word, data, sizeof(word));
    return word;
}

}  // namespace everstep
