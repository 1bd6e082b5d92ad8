#include "pages.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <vector>

namespace everstep {
namespace {

#if defined(__linux__)

constexpr int kPopulateRead = 22;  // MADV_POPULATE_READ, which older headers lack
// A fault maps what is in the page cache around it: by default all pages of as many aligned bytes.
constexpr size_t kFaultBytes = 64 << 10;
// Of so many bytes one page stands for all: files are read in steps of about this size.
constexpr size_t kProbeBytes = 1 << 20;

// Whole pages.
struct Pages {
    uint8_t* begin;
    size_t bytes;
};

size_t page_bytes() {
    static const auto found = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return found;
}

Pages pages_of(std::span<const uint8_t> bytes) {
    const size_t before = reinterpret_cast<uintptr_t>(bytes.data()) % page_bytes();
    const size_t whole = (before + bytes.size() + page_bytes() - 1) / page_bytes() * page_bytes();
    return {const_cast<uint8_t*>(bytes.data()) - before, whole};
}

bool all_resident(const Pages& pages) {
    std::vector<unsigned char> found(pages.bytes / page_bytes());
    if (mincore(pages.begin, pages.bytes, found.data()) != 0) return false;
    return std::all_of(found.begin(), found.end(), [](unsigned char page) { return page & 1; });
}

int populate(uint8_t* begin, size_t bytes) {
    while (madvise(begin, bytes, kPopulateRead) != 0) {
        if (errno != EINTR && errno != EAGAIN) return errno;
    }
    return 0;
}

long minor_faults() {
    rusage used{};
    getrusage(RUSAGE_THREAD, &used);
    return used.ru_minflt;
}

// The first byte behind `at` at a multiple of `step`, but not behind `end`.
uint8_t* next_step(uint8_t* at, uint8_t* end, size_t step) {
    return std::min(end, at + (step - reinterpret_cast<uintptr_t>(at) % step));
}

#endif

}  // namespace

#if defined(__linux__)

bool pages_missing(std::span<const uint8_t> bytes) {
    if (bytes.empty()) return false;
    const Pages pages = pages_of(bytes);
    uint8_t* const end = pages.begin + pages.bytes;
    for (uint8_t* at = pages.begin; at < end; at = next_step(at, end, kProbeBytes)) {
        if (!all_resident({at, page_bytes()})) return true;
    }
    return false;
}

int populate_pages(std::span<const uint8_t> bytes, bool told) {
    if (bytes.empty()) return 0;
    const Pages pages = pages_of(bytes);
    uint8_t* const end = pages.begin + pages.bytes;
    // To populate takes a step for each entry of the page table. Where a file lies in memory in
    // huge pages these are few, and a small part of the range takes one fault, or two. Otherwise
    // one page for each range that a fault maps, and a look at the others, cost much less.
    uint8_t* const sample_end = std::min(end, pages.begin + 4 * kFaultBytes);
    const long faults = minor_faults();
    const int error = populate(pages.begin, static_cast<size_t>(sample_end - pages.begin));
    if (error != 0 || sample_end == end) return error;
    const Pages rest{sample_end, static_cast<size_t>(end - sample_end)};
    if (told && minor_faults() - faults > 2) {
        for (uint8_t* at = rest.begin; at < end; at = next_step(at, end, kFaultBytes)) {
            const int step_error = populate(at, page_bytes());
            if (step_error != 0) return step_error;
        }
        if (all_resident(rest)) return 0;
    }
    return populate(rest.begin, rest.bytes);
}

#else

bool pages_missing(std::span<const uint8_t>) {
    return false;
}

int populate_pages(std::span<const uint8_t>, bool) {
    return EINVAL;
}

#endif

}  // namespace everstep
