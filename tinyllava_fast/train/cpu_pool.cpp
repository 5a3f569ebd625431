// A torch allocator for CPU tensors that train: freed memory stays, in huge pages, and is found again.
//
// Large blocks come from one reserved range of addresses: best fit, lowest address first, neighbours merged. glibc's
// heap cannot do that: torch asks for aligned memory, so a hole of the right size is never large enough, and small
// objects that outlive a step pin the end of it. Blocks below SMALL go to torch's own allocator.
// Built at run time against the headers of the torch that is installed (train/cpu_pool.py).

#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace {

constexpr size_t SMALL = size_t{64} << 10;
constexpr size_t GRAIN = size_t{4} << 10;  // block sizes are multiples of a page
constexpr size_t HUGE_PAGE = size_t{2} << 20;

class Pool final : public c10::Allocator {
 public:
  // Once: blocks of an earlier range would no longer be known as the pool's when they are freed.
  bool reserve(size_t bytes) {
    if (begin_ != nullptr) return true;
    void* raw =
        mmap(nullptr, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) return false;
    const size_t start = (reinterpret_cast<size_t>(raw) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    madvise(reinterpret_cast<void*>(start), bytes, MADV_HUGEPAGE);  // where the kernel has none, small pages do
    begin_ = reinterpret_cast<char*>(start), end_ = begin_ + bytes / GRAIN * GRAIN;
    insert(begin_, end_ - begin_);
    return true;
  }

  c10::DataPtr allocate(size_t n) override {
    char* block = n < SMALL ? nullptr : take((n + GRAIN - 1) / GRAIN * GRAIN);
    if (block != nullptr)
      c10::profiledCPUMemoryReporter().New(block, n);
    else
      block = static_cast<char*>(c10::GetDefaultCPUAllocator()->raw_allocate(n));
    return {block, block, &Pool::release, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* target, const void* source, std::size_t count) const override {
    std::memcpy(target, source, count);
  }

  c10::DeleterFnPtr raw_deleter() const override { return &Pool::release; }

  void stats(size_t* out, bool reset) {
    const std::lock_guard<std::mutex> lock(mutex_);
    out[0] = used_bytes_, out[1] = peak_bytes_;
    if (reset) peak_bytes_ = used_bytes_;
  }

  // Pages of free blocks go back to the kernel; their addresses stay.
  void trim() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [start, size] : free_) madvise(start, size, MADV_DONTNEED);
  }

  static Pool& instance() {
    static Pool* pool = new Pool;  // never destroyed: tensors may outlive static objects
    return *pool;
  }

 private:
  // One deleter for both origins: oneDNN takes raw pointers and gives them back without saying whose they are.
  static void release(void* block) {
    Pool& pool = instance();
    if (block < pool.begin_ || block >= pool.end_) {
      c10::GetDefaultCPUAllocator()->raw_deallocate(block);
      return;
    }
    c10::profiledCPUMemoryReporter().Delete(block);
    pool.give(static_cast<char*>(block));
  }

  char* take(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = by_size_.lower_bound({size, nullptr});
    if (found == by_size_.end()) return nullptr;
    const auto [room, start] = *found;
    erase(start, room);
    if (room > size) insert(start + size, room - size);
    used_.emplace(start, size);
    used_bytes_ += size;
    peak_bytes_ = used_bytes_ > peak_bytes_ ? used_bytes_ : peak_bytes_;
    return start;
  }

  void give(char* start) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto block = used_.find(start);
    size_t size = block->second;
    used_.erase(block);
    used_bytes_ -= size;
    const auto next = free_.find(start + size);
    if (next != free_.end()) {
      const size_t room = next->second;
      erase(start + size, room);
      size += room;
    }
    const auto after = free_.lower_bound(start);
    if (after != free_.begin()) {
      const auto [before, room] = *std::prev(after);
      if (before + room == start) {
        erase(before, room);
        start = before;
        size += room;
      }
    }
    insert(start, size);
  }

  void insert(char* start, size_t size) {
    free_.emplace(start, size);
    by_size_.emplace(size, start);
  }

  void erase(char* start, size_t size) {
    free_.erase(start);
    by_size_.erase({size, start});
  }

  char *begin_ = nullptr, *end_ = nullptr;
  std::mutex mutex_;
  std::map<char*, size_t> free_;
  std::set<std::pair<size_t, char*>> by_size_;
  std::unordered_map<char*, size_t> used_;
  size_t used_bytes_ = 0, peak_bytes_ = 0;
};

}  // namespace

// Reserve addresses and hand torch the pool; 0 if the kernel refuses.
extern "C" int tlf_pool_install(size_t bytes) {
  if (!Pool::instance().reserve(bytes)) return 0;
  c10::SetCPUAllocator(&Pool::instance(), 1);
  return 1;
}

// out[0]: bytes in use; out[1]: their peak since the last call with reset.
extern "C" void tlf_pool_stats(size_t* out, int reset) { Pool::instance().stats(out, reset != 0); }

extern "C" void tlf_pool_trim() { Pool::instance().trim(); }
