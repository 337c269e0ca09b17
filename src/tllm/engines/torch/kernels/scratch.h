// Memory that a thread keeps between calls.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

class Scratch {
  public:
    ~Scratch() { free(memory_); }

    // At least so many bytes, aligned to a cache line; what was in them is gone. It is never less than before.
    uint8_t* get(int64_t bytes) {
        if (bytes > size_) {
            free(memory_);
            size_ = 0;
            memory_ = nullptr;
            int64_t size = (bytes + 4095) / 4096 * 4096;
            if (posix_memalign(&memory_, 4096, size)) {
                memory_ = nullptr;
                throw std::bad_alloc();
            }
            size_ = size;
        }
        return static_cast<uint8_t*>(memory_);
    }

  private:
    void* memory_ = nullptr;
    int64_t size_ = 0;
};
