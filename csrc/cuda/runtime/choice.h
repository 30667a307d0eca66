// The choice among the kernels of an op, the same for all ops.
//
// An op's kernels are variants: a struct of its own with
//
//   static constexpr const char* kOps[]     the families among which a choice is made, such as the passes
//   KernelInfo info
//   using Candidate = ...                   what is planned for this kernel; has a member `cost`
//   const char* refusal(call, device) const        why the kernel cannot run the call, in words; null if it can
//   Candidate candidate(call, device) const        how it would run it, and what that costs
//
// beside the pointers that launch it. The files in sm80/, ... register them: a kernel that is not built is not there.
#pragma once

#include <array>
#include <deque>
#include <limits>
#include <string>
#include <vector>

#include "cuda/runtime/device_info.h"
#include "cuda/runtime/kernel_table.h"
#include "cuda/runtime/launcher.h"

namespace fastconv::cuda {

// What a launch asks of the device and what it wastes: all that the choice looks at. Rates are estimates, not measured.
struct Cost {
  LaunchShape shape;
  double rate = 1;   // work per time of a multiprocessor that is full of it, beside the family's fastest kernel
  double fill = 1;   // useful work / all work: tiles reach beyond the edges of a matrix
  double rest = 1;   // what of that is left by other losses
  int resident = 1;  // blocks on a multiprocessor that the kernel's launch bounds promise
  int splits = 1;    // how many blocks share the depth of a tile; noted, no part of the score
  const char* objection = nullptr;  // why it should not run although it could, which makes its score 0
  bool unproven = false;            // whether it is chosen only where the call prefers it, as one that was qualified is
};

// What becomes of a launch on a device.
struct Outlook {
  int64_t blocks = 0;  // of the grid
  int resident = 0;    // of them on a multiprocessor at once
  double waves = 0;    // blocks / the places for as many on each multiprocessor as one of them gets
  double score = 0;    // rate x fill x rest x waves x occupancy, from 0 to 1: the larger, the sooner the call is done
};
Outlook outlook(const Cost& cost, const DeviceInfo& device);

// Blocks of this shape on a multiprocessor at once, of which registers allow `most`
int64_t resident_blocks(const LaunchShape& shape, int most, const DeviceInfo& device);

// Notes what was considered for one call, if anybody listens (`fastconv_cuda_record_choices`).
class ChoiceRecord {
 public:
  ChoiceRecord(const char* op, const DeviceInfo& device);
  ~ChoiceRecord();
  ChoiceRecord(const ChoiceRecord&) = delete;
  ChoiceRecord& operator=(const ChoiceRecord&) = delete;
  void refuse(const KernelInfo& kernel, const char* reason);
  void consider(const KernelInfo& kernel, const Cost& cost, const Outlook& outlook);
  void choose(const KernelInfo& kernel) { chosen_ = &kernel; }

 private:
  void note(const KernelInfo& kernel, const char* reason, const std::string& numbers);

  const bool listening_;
  const char* const op_;
  const DeviceInfo& device_;
  std::string candidates_;
  const KernelInfo* chosen_ = nullptr;
};

// The name of the kernel that was forced upon `op`, or null when the choice is free.
const char* forced_kernel(const char* op);

// The kernel of `op` that this thread prefers, or null.
const KernelInfo* preferred_kernel(const char* op);

// Why no call may run the kernel, by `fastconv_cuda_disable_kernels`; null if it may.
const char* disabled(const KernelInfo& kernel);

// A launch that is forced to a kernel which cannot run the call fails; it does not choose another.
[[noreturn]] void refuse_forced(const KernelInfo& kernel, const char* refusal);
[[noreturn]] void refuse_call(const char* op);

// The variants of a family, in the order in which they were registered.
template <class Variant>
std::deque<Variant>& variants(int family) {
  static auto& all = *new std::array<std::deque<Variant>, std::size(Variant::kOps)>;
  return all[family];
}

// At namespace scope of a file with kernels: makes them known.
template <class Variant>
struct Register {
  Register(int family, const std::vector<Variant>& list) {
    for (const Variant& variant : list) list_kernel(variants<Variant>(family).emplace_back(variant).info, true);
  }
};

template <class Variant>
struct Chosen {
  const Variant* variant = nullptr;
  typename Variant::Candidate plan{};
};

// The one that was forced; else the one that this thread prefers, if it can run the call; else that of the best score,
// of equals the one that was registered first. Null when none can run the call, or none should.
template <class Variant, class Call>
Chosen<Variant> choose_if_any(int family, const Call& call, const DeviceInfo& device) {
  const char* const op = Variant::kOps[family];
  const char* const forced = forced_kernel(op);
  const KernelInfo* const preferred = preferred_kernel(op);
  ChoiceRecord record(op, device);
  Chosen<Variant> best;
  double best_score = 0;
  for (const Variant& variant : variants<Variant>(family)) {
    const bool is_forced = forced && variant.info.name == forced;
    const char* refusal = "it is for other GPUs";
    if (variant.info.arch.runs_on(device.arch)) refusal = disabled(variant.info);
    if (!refusal) refusal = variant.refusal(call, device);
    if (refusal) {
      record.refuse(variant.info, refusal);
      if (is_forced) refuse_forced(variant.info, refusal);
      continue;
    }
    typename Variant::Candidate candidate = variant.candidate(call, device);
    const Outlook found = outlook(candidate.cost, device);
    record.consider(variant.info, candidate.cost, found);
    double rank = candidate.cost.unproven ? 0 : found.score;
    if (&variant.info == preferred) rank = std::numeric_limits<double>::infinity();
    if (forced ? is_forced : rank > best_score) {
      best = {&variant, candidate};
      best_score = rank;
    }
  }
  if (best.variant) record.choose(best.variant->info);
  return best;
}

// The same, for calls that nothing else can run: throws when there is no variant.
template <class Variant, class Call>
Chosen<Variant> choose(int family, const Call& call, const DeviceInfo& device) {
  const Chosen<Variant> best = choose_if_any<Variant>(family, call, device);
  if (!best.variant) refuse_call(Variant::kOps[family]);
  return best;
}

}  // namespace fastconv::cuda

extern "C" {
// name null: back to the free choice. Returns 0, or 1 when `op` has no kernel of that name to choose.
__attribute__((visibility("default"))) int fastconv_cuda_force_kernel(const char* op, const char* name);
// What `fastconv_cuda_prefer_kernels` takes for the kernel of this name among which `op` chooses; -1 where there is
// none.
__attribute__((visibility("default"))) int fastconv_cuda_find_kernel(const char* op, const char* name);
// Adds to what this thread prefers: each kernel is taken wherever it can run the call and none is forced. Of two of an
// op the later one counts. Numbers that `fastconv_cuda_find_kernel` did not return are passed over.
__attribute__((visibility("default"))) void fastconv_cuda_prefer_kernels(const int* kernels, int count);
// Takes back what this thread's last call of `fastconv_cuda_prefer_kernels` added that was not taken back yet.
__attribute__((visibility("default"))) void fastconv_cuda_end_preference();
// No call of any thread runs these kernels any more, of whatever op; replaces what was disabled before. Names that no
// kernel has are passed over.
__attribute__((visibility("default"))) void fastconv_cuda_disable_kernels(const char* const* names, int count);
// Whether choices are noted from now on, by all threads; forgets those that were.
__attribute__((visibility("default"))) void fastconv_cuda_record_choices(int on);
// The choices that were noted, as JSON, a list of {"op", "arch", "multiprocessors", "chosen", "candidates"}, of which
// the last is a list of {"kernel", "reason"}, and where it can run the call {"score", "blocks", "resident", "fill",
// "waves", "splits", "unproven"}; forgets them. Valid until the thread's next call.
__attribute__((visibility("default"))) const char* fastconv_cuda_take_choices();
}
