// Python face of the copier: owns what a job copies to, and releases the interpreter lock wherever
// a thread may have to wait.
#include "module_copier.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "copier.h"
#include "copy_common.h"
#include "copy_plan.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace everstep {
namespace {

using Addresses = nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Target = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Checksums = nb::ndarray<uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Integers = std::vector<int64_t>;

// How long a waiting thread is deaf to signals.
constexpr double kSignalCheckS = 0.1;

struct PyPlan {
    std::shared_ptr<const CopyPlan> plan;

    PyPlan(const Integers& starts, const std::vector<Integers>& shapes,
           const std::vector<Integers>& strides_bytes, const Integers& item_bytes,
           int64_t data_bytes, int64_t block_bytes) {
        const size_t count = starts.size();
        if (shapes.size() != count || strides_bytes.size() != count || item_bytes.size() != count) {
            refuse("there are " + std::to_string(count) + " starts, " +
                   std::to_string(shapes.size()) + " shapes, " +
                   std::to_string(strides_bytes.size()) + " strides and " +
                   std::to_string(item_bytes.size()) + " item sizes; expected as many of each");
        }
        std::vector<Piece> pieces;
        for (size_t i = 0; i < count; ++i)
            pieces.push_back({starts[i], shapes[i], strides_bytes[i], item_bytes[i]});
        plan = std::make_shared<const CopyPlan>(pieces, data_bytes, block_bytes);
    }
};

class PyJob {
  public:
    PyJob(std::shared_ptr<CopyJob> job, Target dst, Checksums crcs)
        : job_(std::move(job)), dst_(std::move(dst)), crcs_(std::move(crcs)) {}
    PyJob(PyJob&&) = default;

    // dst and crcs go only when no thread writes to them any more.
    ~PyJob() {
        if (!job_) return;
        if (!job_->owner().here()) {
            // A forked child cannot destroy the locks of its parent: they may be held forever.
            static_cast<void>(new std::shared_ptr<CopyJob>(std::move(job_)));
            return;
        }
        const nb::gil_scoped_release unlocked;
        job_->cancel();
    }

    bool done() const { return job_->done(); }
    int64_t copied_bytes() const { return job_->copied_bytes(); }

    double help() const {
        const nb::gil_scoped_release unlocked;
        return job_->help();
    }

    bool wait(double timeout_s) const {
        using Clock = std::chrono::steady_clock;
        const Clock::time_point begin = Clock::now();
        for (;;) {
            const std::chrono::duration<double> passed = Clock::now() - begin;
            const double left_s = timeout_s - passed.count();
            bool done = false;
            {
                const nb::gil_scoped_release unlocked;
                // A timeout that makes no sense is refused there, as it is.
                done = job_->wait(timeout_s >= 0.0 ? std::clamp(left_s, 0.0, kSignalCheckS)
                                                   : timeout_s);
            }
            if (done || job_->cancelled() || left_s <= kSignalCheckS) return done;
            if (PyErr_CheckSignals() != 0) throw nb::python_error();
        }
    }

    void set_rate(std::optional<double> bytes_per_s) const {
        const nb::gil_scoped_release unlocked;
        job_->set_rate(bytes_per_s);
    }

    void cancel() const {
        const nb::gil_scoped_release unlocked;
        job_->cancel();
    }

    nb::dict stats() const {
        const CopyStats stats = job_->stats();
        nb::dict named;
        named["background_cpu_s"] = stats.background_cpu_s;
        named["background_bytes"] = stats.background_bytes;
        named["help_s"] = stats.help_s;
        named["help_bytes"] = stats.help_bytes;
        named["elapsed_s"] = stats.elapsed_s;
        return named;
    }

  private:
    std::shared_ptr<CopyJob> job_;
    Target dst_;
    Checksums crcs_;
};

class PyCopier {
  public:
    PyCopier(int64_t threads, int64_t nice) : copier_(std::make_unique<Copier>(threads, nice)) {}

    ~PyCopier() {
        const nb::gil_scoped_release unlocked;
        copier_.reset();
    }

    PyJob start(const PyPlan& plan, const Addresses& addresses, const Target& dst,
                const Checksums& crcs, std::optional<double> bytes_per_s) const {
        std::vector<uint64_t> copied(addresses.data(), addresses.data() + addresses.size());
        std::shared_ptr<CopyJob> job;
        {
            const nb::gil_scoped_release unlocked;
            job = copier_->start(plan.plan, std::move(copied), {dst.data(), dst.size()},
                                 {crcs.data(), crcs.size()}, bytes_per_s);
        }
        return {std::move(job), dst, crcs};
    }

    void close() const {
        const nb::gil_scoped_release unlocked;
        copier_->close();
    }

  private:
    std::unique_ptr<Copier> copier_;
};

}  // namespace

void add_copier(nb::module_& module) {
    nb::class_<PyPlan>(module, "CopyPlan")
        .def(nb::init<const Integers&, const std::vector<Integers>&, const std::vector<Integers>&,
                      const Integers&, int64_t, int64_t>(),
             "starts"_a, "shapes"_a, "strides_bytes"_a, "item_bytes"_a, "data_bytes"_a,
             "block_bytes"_a)
        .def_prop_ro("blocks", [](const PyPlan& plan) { return plan.plan->blocks(); });
    nb::class_<PyJob>(module, "CopyJob")
        .def_prop_ro("done", &PyJob::done)
        .def_prop_ro("copied_bytes", &PyJob::copied_bytes)
        .def("help", &PyJob::help)
        .def("wait", &PyJob::wait, "timeout_s"_a)
        .def("set_rate", &PyJob::set_rate, "bytes_per_s"_a.none())
        .def("cancel", &PyJob::cancel)
        .def("stats", &PyJob::stats);
    nb::class_<PyCopier>(module, "Copier")
        .def(nb::init<int64_t, int64_t>(), "threads"_a, "nice"_a)
        .def("start", &PyCopier::start, "plan"_a, "addresses"_a.noconvert(), "dst"_a.noconvert(),
             "crcs"_a.noconvert(), "bytes_per_s"_a.none())
        .def("close", &PyCopier::close);
}

}  // namespace everstep
