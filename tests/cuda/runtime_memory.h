// The memory of one device of runtime_shim.cc.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <map>

namespace shim {

using Work = std::function<void()>;

constexpr size_t kMemory = size_t{8} << 30, kPage = 4096;

// One range of addresses, from which each allocation takes new pages.
class Memory {
 public:
  Memory() {
    base_ = static_cast<char*>(mmap(nullptr, kMemory, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) abort();
  }
  void* take(size_t bytes) {
    const size_t whole = (bytes + kPage - 1) / kPage * kPage;
    if (whole > kMemory - used_) return nullptr;
    void* block = base_ + used_;
    used_ += whole;
    sizes_[block] = whole;
    held_ += whole;
    peak_ = std::max(peak_, held_);
    return block;
  }
  void give_back(void* block) {
    const auto found = sizes_.find(block);
    if (found == sizes_.end()) abort();
    madvise(block, found->second, MADV_DONTNEED);
    held_ -= found->second;
    sizes_.erase(found);
  }
  bool holds(const void* address) const { return address >= base_ && address < base_ + kMemory; }
  size_t free_bytes() const { return kMemory - used_; }
  // Most that has been taken at once since the last call, and what is taken now.
  std::array<size_t, 2> peak_and_held() {
    const std::array<size_t, 2> both{peak_, held_};
    peak_ = held_;
    return both;
  }

  // Device code runs, or a copy.
  void run(const Work& work) {
    if (depth_++ == 0) mprotect(base_, used_, PROT_READ | PROT_WRITE);
    work();
    if (--depth_ == 0) mprotect(base_, used_, PROT_NONE);
  }

 private:
  char* base_ = nullptr;
  size_t used_ = 0, held_ = 0, peak_ = 0;
  int depth_ = 0;
  std::map<void*, size_t> sizes_;
};

}  // namespace shim
