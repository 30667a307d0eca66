#include "cuda/runtime/choice.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <climits>
#include <map>
#include <mutex>
#include <stdexcept>

#include "cuda/runtime/json.h"

namespace fastconv::cuda {
namespace {

// Of every block's shared memory the system keeps a part.
constexpr int64_t kReservedShared = 1024;

std::mutex mutex;
std::atomic<int> forced_count = 0;
std::atomic<bool> recording = false;

std::map<std::string, const char*>& forced() {
  static auto& table = *new std::map<std::string, const char*>;
  return table;
}

std::string& recorded() {
  static auto& text = *new std::string;
  return text;
}

// Not by std::to_string, which writes what the locale says.
std::string as_json(double value) {
  std::array<char, 32> text{};
  return {text.data(), std::to_chars(text.begin(), text.end(), value).ptr};
}

}  // namespace

double score(const Cost& cost, const DeviceInfo& device) {
  if (cost.objection) return 0;
  const auto& [grid, block, shared] = cost.shape;
  const int64_t blocks = std::max<int64_t>(int64_t{grid.x} * grid.y * grid.z, 1);
  const int64_t threads = std::max<int64_t>(int64_t{block.x} * block.y * block.z, 1);
  const int64_t by_threads = device.threads_per_multiprocessor / threads;
  const int64_t by_shared = shared > 0 ? device.shared_per_multiprocessor / (shared + kReservedShared) : INT_MAX;
  const int64_t resident = std::max<int64_t>(std::min({int64_t{cost.resident}, by_threads, by_shared}), 1);
  const int64_t at_once = resident * device.multiprocessors;
  const double waves = static_cast<double>(blocks) / static_cast<double>(ceil_div(blocks, at_once) * at_once);
  const double occupancy = static_cast<double>(resident) / cost.resident;
  return cost.rate * cost.fill * waves * occupancy;
}

ChoiceRecord::ChoiceRecord(const char* op, const DeviceInfo& device)
    : listening_(recording), op_(op), device_(device) {}

ChoiceRecord::~ChoiceRecord() {
  if (!listening_) return;
  const std::string text = "{\"op\": " + quoted(op_) + ", \"arch\": " + std::to_string(device_.arch) +
                           ", \"multiprocessors\": " + std::to_string(device_.multiprocessors) +
                           ", \"chosen\": " + quoted(chosen_ ? chosen_->name : "") + ", \"candidates\": [" +
                           candidates_ + "]}";
  const std::lock_guard<std::mutex> lock(mutex);
  recorded() += (recorded().empty() ? "" : ", ") + text;
}

void ChoiceRecord::consider(const KernelInfo& kernel, const char* reason, double score) {
  if (!listening_) return;
  candidates_ += candidates_.empty() ? "" : ", ";
  candidates_ += "{\"kernel\": " + quoted(kernel.name) + ", \"reason\": " + quoted(reason ? reason : "") +
                 ", \"score\": " + as_json(score) + "}";
}

const char* forced_kernel(const char* op) {
  if (forced_count == 0) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = forced().find(op);
  return found == forced().end() ? nullptr : found->second;
}

void refuse_forced(const KernelInfo& kernel, const char* refusal) {
  const std::string needs = *kernel.needs ? std::string("needs ") + kernel.needs : "cannot run this call";
  throw std::runtime_error("fastconv: kernel " + kernel.name + " was forced, but " + needs + " (" + refusal + ")");
}

void refuse_call(const char* op) {
  throw std::runtime_error(std::string("fastconv: ") + op + " has no CUDA kernel for this call");
}

}  // namespace fastconv::cuda

int fastconv_cuda_force_kernel(const char* op, const char* name) {
  using namespace fastconv::cuda;
  const KernelInfo* known = name ? find_variant(op, name) : nullptr;
  if (name && !known) return 1;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known) {
    forced()[op] = known->name.c_str();
  } else {
    forced().erase(op);
  }
  forced_count = static_cast<int>(forced().size());
  return 0;
}

void fastconv_cuda_record_choices(int on) {
  using namespace fastconv::cuda;
  const std::lock_guard<std::mutex> lock(mutex);
  recording = on != 0;
  recorded().clear();
}

const char* fastconv_cuda_take_choices() {
  using namespace fastconv::cuda;
  thread_local std::string taken;
  const std::lock_guard<std::mutex> lock(mutex);
  taken = "[" + recorded() + "]";
  recorded().clear();
  return taken.c_str();
}
