// Fork and join over a few threads that live for one job.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace everstep {

// Below this much work per thread, starting one costs more than it saves.
inline constexpr int64_t kThreadBytes = 4 << 20;

// How many of at most `threads` threads a job of `bytes` deserves; at least 1.
inline int64_t useful_threads(int64_t threads, int64_t bytes) {
    return std::max<int64_t>(1, std::min(threads, bytes / kThreadBytes));
}

// Runs part(0) .. part(parts - 1), the last one on this thread. The function must not throw. Where
// the system refuses a thread the part runs here.
template <typename Part>
void run_parts(int64_t parts, const Part& part) {
    std::vector<std::thread> threads;
    threads.reserve(static_cast<size_t>(parts));
    for (int64_t index = 0; index + 1 < parts; ++index) {
        try {
            threads.emplace_back([&part, index] { part(index); });
        } catch (const std::system_error&) {
            part(index);
        }
    }
    part(parts - 1);
    for (std::thread& thread : threads)
        thread.join();
}

}  // namespace everstep
