// Pages of mapped files: brought in so that an error of the device is an error code, not a signal.
#pragma once

#include <cstdint>
#include <span>

namespace everstep {

// Whether some of the bytes are not in the page cache, judged by one page of each MiB. The kernel
// says so only to who owns the file or may write it (Linux 5.2 and later): to others all is there.
bool pages_missing(std::span<const uint8_t> bytes);

// Brings all of the bytes into the page cache and maps most of them; the error number, 0 for none.
// EINVAL: the kernel cannot do so (Linux before 5.14). `told` is whether the kernel says the truth
// about which pages are there; where it does, less work is done.
int populate_pages(std::span<const uint8_t> bytes, bool told);

}  // namespace everstep
