// Copies in the background: live memory into the data of a pack, while its owner computes on.
#pragma once

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "copy_plan.h"

namespace everstep {

// Threads do not follow into a forked child: what needs them belongs to the process that made it.
class OwnProcess {
  public:
    bool here() const { return getpid() == pid_; }

    // Throws std::runtime_error in any other process.
    void require() const;

  private:
    pid_t pid_ = getpid();
};

// Hands out bytes at a rate: a token bucket that holds one unit at most. Not thread-safe.
class Pace {
  public:
    using Clock = std::chrono::steady_clock;

    explicit Pace(int64_t unit_bytes) : unit_bytes_(static_cast<double>(unit_bytes)) {}

    // Bytes per second; none: no limit, 0: a halt.
    void set_rate(std::optional<double> rate, Clock::time_point now);

    // Seconds until take() is allowed, 0 for now; infinite for a halt.
    double seconds_left(Clock::time_point now);

    void take(int64_t bytes) { tokens_ -= rate_ ? static_cast<double>(bytes) : 0.0; }

  private:
    void refill(Clock::time_point now);

    double unit_bytes_;
    std::optional<double> rate_;
    double tokens_ = 0.0;  // in bytes
    Clock::time_point refilled_{};
};

struct CopyStats {
    double background_cpu_s;
    int64_t background_bytes;
    double help_s;
    int64_t help_bytes;
    double elapsed_s;  // from the start until all was copied, or until now
};

// One copy of everything in a plan. Blocks are handed out one by one, so that any number of threads
// may take part; what they write is visible to whoever has seen done(). Thread-safe.
class CopyJob {
  public:
    using Clock = Pace::Clock;

    // Throws std::invalid_argument when the arguments do not fit the plan.
    CopyJob(std::shared_ptr<const CopyPlan> plan, std::vector<uint64_t> addresses,
            std::span<uint8_t> dst, std::span<uint32_t> crcs, std::optional<double> bytes_per_s);

    bool done() const { return done_.load(std::memory_order_acquire); }
    bool cancelled() const { return cancelled_.load(std::memory_order_relaxed); }
    int64_t copied_bytes() const;
    CopyStats stats() const;
    const OwnProcess& owner() const { return owner_; }

    // Copies at full speed until all is copied, and waits for what others have in hand; returns
    // the seconds that took. Throws std::runtime_error when the job is cancelled.
    double help();

    // Sleeps until all is copied, the job is cancelled or the time is up; whether all is copied.
    bool wait(double timeout_s);

    // How fast all background threads together copy; see Pace. Throws std::invalid_argument.
    void set_rate(std::optional<double> bytes_per_s);

    // Returns when no thread copies any more: each finishes the block in hand.
    void cancel();

    // Copies as a background thread does, at the rate, until no block is left to begin.
    void work();

  private:
    int64_t take_block();
    void copy(int64_t block);
    void count_block();
    bool wait_for_turn();
    void enter();
    void leave();
    bool over() const { return done() || cancelled(); }

    const OwnProcess owner_;
    const std::shared_ptr<const CopyPlan> plan_;
    const std::vector<uint64_t> addresses_;
    uint8_t* const dst_;
    const std::span<uint32_t> crcs_;
    const Clock::time_point started_;

    std::atomic<int64_t> next_block_ = 0;
    std::atomic<int64_t> blocks_copied_ = 0;
    std::atomic<int64_t> background_bytes_ = 0;
    std::atomic<int64_t> help_bytes_ = 0;
    std::atomic<int64_t> background_cpu_ns_ = 0;
    std::atomic<int64_t> help_ns_ = 0;
    std::atomic<int64_t> elapsed_ns_ = 0;  // written before done_
    std::atomic<bool> done_ = false;
    std::atomic<bool> cancelled_ = false;

    std::mutex mutex_;
    std::condition_variable changed_;  // done_, cancelled_, the pace, threads_inside_ is 0
    int64_t threads_inside_ = 0;       // that may touch dst and the sources
    Pace pace_;
};

// A pool of background threads, started with the first job; jobs are copied one after the other.
// Thread-safe, and harmless in a forked child, where its threads are not.
class Copier {
  public:
    // `nice` (0 to 19) is for the threads of the pool only, and a wish: a process that runs at a
    // higher one, or may not set it, keeps what it has. Throws std::invalid_argument.
    Copier(int64_t threads, int64_t nice);
    ~Copier();
    Copier(const Copier&) = delete;
    Copier& operator=(const Copier&) = delete;

    // What the arguments point to must stay, and the sources unchanged, until the job is done or
    // cancelled. Throws std::invalid_argument when they do not fit the plan, std::runtime_error
    // when the copier is closed, in another process, or gets no threads.
    std::shared_ptr<CopyJob> start(std::shared_ptr<const CopyPlan> plan,
                                   std::vector<uint64_t> addresses, std::span<uint8_t> dst,
                                   std::span<uint32_t> crcs, std::optional<double> bytes_per_s);

    // Cancels what is not done, and ends the threads. May be called again.
    void close();

  private:
    struct Pool;
    std::unique_ptr<Pool> pool_;
};

}  // namespace everstep
