// Kernels are compiled with clang's -fsanitize=thread, which calls these functions before every load and store that is
// not to a local variable. No sanitizer's runtime is linked: these are all there is.
#include <link.h>

#include <algorithm>
#include <cstring>

#include "block.h"

using fastconv::emulator::Block;
using fastconv::emulator::current_block;
using fastconv::emulator::Place;

namespace {

struct Image {
  uintptr_t begin = UINTPTR_MAX, end = 0;
};

// Where this library lies: constants of the kernels are read from it.
const Image& image() {
  static const Image self = [] {
    Image found;
    const auto look = [](dl_phdr_info* info, size_t, void* result) {
      Image lies;
      for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& header = info->dlpi_phdr[i];
        if (header.p_type != PT_LOAD) continue;
        lies.begin = std::min<uintptr_t>(lies.begin, info->dlpi_addr + header.p_vaddr);
        lies.end = std::max<uintptr_t>(lies.end, info->dlpi_addr + header.p_vaddr + header.p_memsz);
      }
      const auto here = reinterpret_cast<uintptr_t>(&current_block);
      if (here < lies.begin || here >= lies.end) return 0;
      *static_cast<Image*>(result) = lies;
      return 1;
    };
    dl_iterate_phdr(look, &found);
    return found;
  }();
  return self;
}

inline void access(const void* pointer, size_t bytes, bool write, bool aligned, const void* pc) {
  Block* const block = current_block();
  if (block == nullptr || bytes == 0) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (block->owns_stack(address)) return;
  if (!write && address - image().begin < image().end - image().begin) return;
  block->access(pointer, bytes, write, aligned, Place(pc));
}

}  // namespace

#define HOOK extern "C" __attribute__((visibility("hidden")))
#define HOOKS(bytes)                                                                                               \
  HOOK void __tsan_read##bytes(void* p) { access(p, bytes, false, true, __builtin_return_address(0)); }            \
  HOOK void __tsan_write##bytes(void* p) { access(p, bytes, true, true, __builtin_return_address(0)); }            \
  HOOK void __tsan_unaligned_read##bytes(void* p) { access(p, bytes, false, false, __builtin_return_address(0)); } \
  HOOK void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, true, false, __builtin_return_address(0)); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

HOOK void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  access(from, bytes, false, false, __builtin_return_address(0));
  access(to, bytes, true, false, __builtin_return_address(0));
  return std::memcpy(to, from, bytes);
}
HOOK void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  access(from, bytes, false, false, __builtin_return_address(0));
  access(to, bytes, true, false, __builtin_return_address(0));
  return std::memmove(to, from, bytes);
}
HOOK void* __tsan_memset(void* to, int value, size_t bytes) {
  access(to, bytes, true, false, __builtin_return_address(0));
  return std::memset(to, value, bytes);
}
HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_vptr_update(void**, void*) {}
HOOK void __tsan_vptr_read(void**) {}
