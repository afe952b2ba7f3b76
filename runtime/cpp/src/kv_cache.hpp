// Keys and values of earlier positions: one preallocated buffer per layer and kind, bound as past and as present. The
// C++ side of runtime/kv_cache.py.
//
// GroupQueryAttention writes new positions into it in place; `seqlens_k` tells it how many are valid. Nothing is copied
// as an answer grows, and pages that have not been written take no memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "manifest.hpp"
#include "subgraph.hpp"

namespace autosteer {

/// The caches of one decoder half, of one request at a time.
class KVCache {
 public:
  /// Room for `capacity` tokens in every layer of `graph`: (1, num_key_value_heads, capacity, head_dim) each. The
  /// graph has the scales of int8 caches, and quantises what it writes.
  KVCache(const GraphSpec& graph, const Manifest& manifest, int64_t capacity)
      : heads_(manifest.dims.num_key_value_heads),
        width_(manifest.dims.head_dim),
        capacity_(capacity),
        is_int8_(manifest.cache_type == "int8") {
    const auto [first, last] = graph.layers.value();
    for (int64_t layer = first; layer < last; ++layer) {
      for (const char* kind : {"key", "value"}) {
        const std::string suffix = std::to_string(layer) + "." + kind;
        past.emplace_back("past_key_values." + suffix, nullptr);
        present.emplace_back("present." + suffix, nullptr);
      }
    }
    buffers_.resize(past.size());
    allocate(0, 0);
  }

  /// Make room for `capacity` tokens and keep the first `length` positions. A cache that is too small doubles, up to
  /// `limit`, so a dialogue copies each position about once.
  void reserve(int64_t capacity, int64_t length, int64_t limit) {
    if (capacity <= capacity_) return;
    const int64_t held = std::exchange(capacity_, std::max(capacity, std::min(2 * capacity_, limit)));
    bytes = 0;
    allocate(length, held);
  }

  /// A cache of its own with the first `length` positions of this one, and room for `capacity` tokens.
  KVCache copy(int64_t length, int64_t capacity) const {
    KVCache own = *this;  // shares the buffers, until `allocate` makes new ones
    own.capacity_ = capacity;
    own.bytes = 0;
    own.allocate(length, capacity_);
    return own;
  }

  Call::Bound past, present;
  int64_t bytes = 0;

 private:
  /// New buffers with the first `length` positions of the old ones, whose capacity is `held`. One buffer at a time:
  /// each old one is freed before the next is made.
  void allocate(int64_t length, int64_t held) {
    for (size_t i = 0; i < buffers_.size(); ++i)
      is_int8_ ? allocate<int8_t>(i, length, held) : allocate<float>(i, length, held);
  }

  template <class T>
  void allocate(size_t i, int64_t length, int64_t held) {
    const auto buffer = std::make_shared<Tensor<T>>(std::vector<int64_t>{1, heads_, capacity_, width_});
    for (int64_t head = 0; length > 0 && head < heads_; ++head) {
      const T* old = static_cast<const Tensor<T>*>(buffers_[i].get())->data() + head * held * width_;
      std::copy(old, old + length * width_, buffer->data() + head * capacity_ * width_);
    }
    past[i].second = present[i].second = &buffer->value();
    bytes += static_cast<int64_t>(buffer->bytes());
    buffers_[i] = buffer;
  }

  int64_t heads_, width_, capacity_;
  bool is_int8_;
  std::vector<std::shared_ptr<void>> buffers_;  // Tensor<float> or Tensor<int8_t>
};

}  // namespace autosteer
