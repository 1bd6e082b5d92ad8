#include "crc32c.h"

#include <array>

namespace everstep {
namespace {

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// table[k][byte] is the contribution of a byte that is followed by k more bytes.
constexpr Tables make_tables() {
    Tables table{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; ++bit) {
            value = (value >> 1) ^ ((value & 1u) ? kCrcPolynomial : 0u);
        }
        table[0][byte] = value;
    }
    for (size_t k = 1; k < 8; ++k) {
        for (size_t byte = 0; byte < 256; ++byte) {
            const uint32_t before = table[k - 1][byte];
            table[k][byte] = (before >> 8) ^ table[0][before & 0xFFu];
        }
    }
    return table;
}

constexpr Tables kTables = make_tables();

}  // namespace

uint32_t crc32c_portable(uint32_t crc, const uint8_t* data, size_t bytes) {
    uint32_t state = ~crc;
    for (; bytes >= 8; bytes -= 8, data += 8) {
        const uint64_t word = load_u64(data) ^ state;
        state = 0;
        for (size_t k = 0; k < 8; ++k) {
            state ^= kTables[7 - k][(word >> (8 * k)) & 0xFFu];
        }
    }
    for (; bytes != 0; --bytes, ++data) {
        state = (state >> 8) ^ kTables[0][(state ^ *data) & 0xFFu];
    }
    return ~state;
}

uint32_t crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t bytes_b) {
    // bytes_b * 8 may exceed 64 bits: take (x^bytes_b)^8 instead.
    uint32_t shift = crc_power_of_x(bytes_b);
    for (int doubling = 0; doubling < 3; ++doubling)
        shift = crc_multiply(shift, shift);
    return crc_multiply(shift, crc_a) ^ crc_b;
}

}  // namespace everstep
