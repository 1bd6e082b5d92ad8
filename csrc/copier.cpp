#include "copier.h"

#include <pthread.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "copy_common.h"

namespace everstep {
namespace {

using Clock = CopyJob::Clock;

// Longer waits are cut, so that no sum of times overflows: a day.
constexpr double kLongestWaitS = 86'400.0;

int64_t nanoseconds(Clock::duration duration) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(duration).count();
}

double seconds(int64_t ns) {
    return 1e-9 * static_cast<double>(ns);
}

Clock::duration wait_of(double wait_s) {
    return std::chrono::duration_cast<Clock::duration>(
        std::chrono::duration<double>(std::clamp(wait_s, 0.0, kLongestWaitS)));
}

int64_t thread_cpu_ns() {
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return int64_t{1'000'000'000} * now.tv_sec + now.tv_nsec;
}

// On Linux the priority is one of a thread; elsewhere of the process, which keeps it.
void become_background_thread(int64_t nice) {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "everstep-copy");
    const auto thread = static_cast<id_t>(syscall(SYS_gettid));
    const int now = getpriority(PRIO_PROCESS, thread);
    if (nice > now) setpriority(PRIO_PROCESS, thread, static_cast<int>(nice));
#else
    static_cast<void>(nice);
#endif
}

}  // namespace

void OwnProcess::require() const {
    if (here()) return;
    throw std::runtime_error("the copier belongs to process " + std::to_string(pid_) +
                             " and its threads are not in process " + std::to_string(getpid()) +
                             ", which was forked: make another copier there");
}

void Pace::set_rate(std::optional<double> rate, Clock::time_point now) {
    refill(now);
    rate_ = rate;
}

double Pace::seconds_left(Clock::time_point now) {
    refill(now);
    if (rate_ == 0.0) return std::numeric_limits<double>::infinity();
    return rate_ && tokens_ < 0.0 ? -tokens_ / *rate_ : 0.0;
}

void Pace::refill(Clock::time_point now) {
    const double elapsed_s = seconds(nanoseconds(now - refilled_));
    refilled_ = now;
    tokens_ = rate_ ? std::min(unit_bytes_, tokens_ + *rate_ * elapsed_s) : 0.0;
}

CopyJob::CopyJob(std::shared_ptr<const CopyPlan> plan, std::vector<uint64_t> addresses,
                 std::span<uint8_t> dst, std::span<uint32_t> crcs,
                 std::optional<double> bytes_per_s)
    : plan_(std::move(plan)),
      addresses_(std::move(addresses)),
      dst_(dst.data()),
      crcs_(crcs),
      started_(Clock::now()),
      pace_(plan_->block_bytes()) {
    plan_->check_addresses(addresses_, dst);
    if (std::ssize(crcs) != plan_->blocks()) {
        refuse("the data has " + std::to_string(plan_->blocks()) +
               " blocks, but there is room for " + std::to_string(crcs.size()) + " checksums");
    }
    set_rate(bytes_per_s);
    done_ = plan_->blocks() == 0;
}

int64_t CopyJob::copied_bytes() const {
    return background_bytes_.load() + help_bytes_.load();
}

CopyStats CopyJob::stats() const {
    const int64_t elapsed_ns = done() ? elapsed_ns_.load() : nanoseconds(Clock::now() - started_);
    return {seconds(background_cpu_ns_), background_bytes_, seconds(help_ns_), help_bytes_,
            seconds(elapsed_ns)};
}

double CopyJob::help() {
    owner_.require();
    const Clock::time_point begin = Clock::now();
    enter();
    while (!cancelled()) {
        const int64_t block = take_block();
        if (block < 0) break;
        copy(block);
        help_bytes_ += plan_->bytes_of(block);
        count_block();
    }
    leave();
    {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return over(); });
    }
    const int64_t ns = nanoseconds(Clock::now() - begin);
    help_ns_ += ns;
    if (!done()) throw std::runtime_error("the copy was cancelled: what it wrote is not complete");
    return seconds(ns);
}

bool CopyJob::wait(double timeout_s) {
    owner_.require();
    if (!(timeout_s >= 0.0)) {
        refuse("timeout_s is " + std::to_string(timeout_s) + "; expected at least 0");
    }
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, wait_of(timeout_s), [this] { return over(); });
    return done();
}

void CopyJob::set_rate(std::optional<double> bytes_per_s) {
    owner_.require();
    if (bytes_per_s && !(*bytes_per_s >= 0.0 && std::isfinite(*bytes_per_s))) {
        refuse("bytes_per_s is " + std::to_string(*bytes_per_s) +
               "; expected a number from 0 on, or none for full speed");
    }
    const std::lock_guard lock(mutex_);
    pace_.set_rate(bytes_per_s, Clock::now());
    changed_.notify_all();
}

void CopyJob::cancel() {
    owner_.require();
    std::unique_lock lock(mutex_);
    cancelled_ = true;
    changed_.notify_all();
    changed_.wait(lock, [this] { return threads_inside_ == 0; });
}

void CopyJob::work() {
    enter();
    int64_t cpu_ns = thread_cpu_ns();
    while (wait_for_turn()) {
        const int64_t block = take_block();
        if (block < 0) break;
        copy(block);
        background_bytes_ += plan_->bytes_of(block);
        const int64_t now_ns = thread_cpu_ns();
        background_cpu_ns_ += now_ns - std::exchange(cpu_ns, now_ns);
        count_block();
    }
    leave();
}

// The next block that nobody has begun, -1 when there is none.
int64_t CopyJob::take_block() {
    const int64_t block = next_block_.fetch_add(1, std::memory_order_relaxed);
    return block < plan_->blocks() ? block : -1;
}

void CopyJob::copy(int64_t block) {
    crcs_[static_cast<size_t>(block)] = plan_->copy_block(block, addresses_, dst_);
}

// Whoever counts the last block has seen all others counted, and so what was written before.
void CopyJob::count_block() {
    if (blocks_copied_.fetch_add(1, std::memory_order_acq_rel) + 1 < plan_->blocks()) return;
    elapsed_ns_ = nanoseconds(Clock::now() - started_);
    const std::lock_guard lock(mutex_);
    done_.store(true, std::memory_order_release);
    changed_.notify_all();
}

// Sleeps as the pace wants it; false when there is nothing left to do.
bool CopyJob::wait_for_turn() {
    std::unique_lock lock(mutex_);
    while (!over() && next_block_.load(std::memory_order_relaxed) < plan_->blocks()) {
        const double left_s = pace_.seconds_left(Clock::now());
        if (left_s <= 0.0) {
            pace_.take(plan_->block_bytes());
            return true;
        }
        changed_.wait_for(lock, wait_of(left_s));
    }
    return false;
}

void CopyJob::enter() {
    const std::lock_guard lock(mutex_);
    ++threads_inside_;
}

void CopyJob::leave() {
    const std::lock_guard lock(mutex_);
    if (--threads_inside_ == 0) changed_.notify_all();
}

struct Copier::Pool {
    const OwnProcess owner;
    const int64_t size;
    const int64_t nice;
    std::mutex mutex;
    std::condition_variable changed;  // jobs, closed
    std::deque<std::shared_ptr<CopyJob>> jobs;
    std::vector<std::thread> threads;
    bool closed = false;

    Pool(int64_t threads_wanted, int64_t nice_wanted) : size(threads_wanted), nice(nice_wanted) {}

    void add(std::shared_ptr<CopyJob> job) {
        const std::lock_guard lock(mutex);
        if (closed) throw std::runtime_error("the copier is closed: make another one");
        try {
            while (std::ssize(threads) < size)
                threads.emplace_back([this] { run(); });
        } catch (const std::system_error& error) {
            // Fewer threads do as well.
            if (threads.empty()) {
                throw std::runtime_error(std::string("no thread to copy in the background: ") +
                                         error.what() +
                                         "; raise the limit of processes (ulimit -u)");
            }
        }
        jobs.push_back(std::move(job));
        changed.notify_all();
    }

    void run() {
        become_background_thread(nice);
        std::unique_lock lock(mutex);
        for (;;) {
            changed.wait(lock, [this] { return closed || !jobs.empty(); });
            if (closed) return;
            const std::shared_ptr<CopyJob> job = jobs.front();
            lock.unlock();
            job->work();
            lock.lock();
            std::erase(jobs, job);
        }
    }

    void close() {
        std::vector<std::thread> ending;
        std::deque<std::shared_ptr<CopyJob>> left;
        {
            const std::lock_guard lock(mutex);
            closed = true;
            ending.swap(threads);
            left = jobs;
            changed.notify_all();
        }
        for (const std::shared_ptr<CopyJob>& job : left)
            job->cancel();
        for (std::thread& thread : ending)
            thread.join();
    }
};

Copier::Copier(int64_t threads, int64_t nice) {
    require_threads(threads);
    if (nice < 0 || nice > 19) {
        refuse("nice is " + std::to_string(nice) + "; expected 0 to 19");
    }
    pool_ = std::make_unique<Pool>(threads, nice);
}

Copier::~Copier() {
    close();
    // The locks and threads of another process cannot be destroyed here.
    if (!pool_->owner.here()) static_cast<void>(pool_.release());
}

std::shared_ptr<CopyJob> Copier::start(std::shared_ptr<const CopyPlan> plan,
                                       std::vector<uint64_t> addresses, std::span<uint8_t> dst,
                                       std::span<uint32_t> crcs,
                                       std::optional<double> bytes_per_s) {
    pool_->owner.require();
    auto job =
        std::make_shared<CopyJob>(std::move(plan), std::move(addresses), dst, crcs, bytes_per_s);
    if (!job->done()) pool_->add(job);
    return job;
}

void Copier::close() {
    if (pool_->owner.here()) pool_->close();
}

}  // namespace everstep
