#include "kernels_arm.h"

#if defined(__aarch64__)

#include <arm_acle.h>

#include <array>

#include "crc32c.h"

#define EVERSTEP_ARM_CRC __attribute__((target("+crc")))

namespace everstep {
namespace {

constexpr size_t kLaneBytes = 1024;

using ShiftTable = std::array<std::array<uint32_t, 256>, 4>;

// table[k][v] is v in byte k of the state, times x^(8 * bytes).
constexpr ShiftTable make_shift_table(uint64_t bytes) {
    ShiftTable table{};
    const uint32_t factor = crc_power_of_x(8 * bytes);
    for (uint32_t k = 0; k < 4; ++k) {
        for (uint32_t bit = 0; bit < 8; ++bit) {
            table[k][1u << bit] = crc_multiply(factor, 1u << (8 * k + bit));
        }
        for (uint32_t value = 1; value < 256; ++value) {
            const uint32_t lowest = value & (0u - value);
            table[k][value] = table[k][lowest] ^ (value == lowest ? 0u : table[k][value ^ lowest]);
        }
    }
    return table;
}

constexpr ShiftTable kShiftOneLane = make_shift_table(kLaneBytes);
constexpr ShiftTable kShiftTwoLanes = make_shift_table(2 * kLaneBytes);

uint32_t shift_state(const ShiftTable& table, uint32_t state) {
    return table[0][state & 0xFFu] ^ table[1][(state >> 8) & 0xFFu] ^
           table[2][(state >> 16) & 0xFFu] ^ table[3][state >> 24];
}

}  // namespace

EVERSTEP_ARM_CRC uint32_t crc32c_armv8(uint32_t crc, const uint8_t* data, size_t bytes) {
    uint32_t state = ~crc;
    // Three neighbouring lanes at once hide the latency of the instruction.
    for (; bytes >= 3 * kLaneBytes; bytes -= 3 * kLaneBytes, data += 3 * kLaneBytes) {
        uint32_t a = state;
        uint32_t b = 0;
        uint32_t c = 0;
        for (size_t at = 0; at < kLaneBytes; at += 8) {
            a = __crc32cd(a, load_u64(data + at));
            b = __crc32cd(b, load_u64(data + at + kLaneBytes));
            c = __crc32cd(c, load_u64(data + at + 2 * kLaneBytes));
        }
        state = shift_state(kShiftTwoLanes, a) ^ shift_state(kShiftOneLane, b) ^ c;
    }
    for (; bytes >= 8; bytes -= 8, data += 8)
        state = __crc32cd(state, load_u64(data));
    for (; bytes != 0; --bytes, ++data)
        state = __crc32cb(state, *data);
    return ~state;
}

}  // namespace everstep

#endif
