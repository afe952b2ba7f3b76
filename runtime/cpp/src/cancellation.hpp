// Ends a stream's runs from another thread, in the middle of a graph, too.
//
// onnxruntime looks at a run's options between two operators. All runs on a thread take theirs from the stream that is
// being asked there (`plain`, `shrinking`): vision encoder, embeddings, decoder and head alike.
#pragma once

#include <atomic>

#include "errors.hpp"
#include "onnxruntime.hpp"

namespace autosteer {

/// The run options of one stream, and whether it was cancelled.
class Cancellation {
 public:
  Cancellation() { shrinking_.AddConfigEntry("memory.enable_memory_arena_shrinkage", "cpu:0"); }
  Cancellation(const Cancellation&) = delete;
  Cancellation& operator=(const Cancellation&) = delete;

  /// Any thread may call this, at any time. It cannot be taken back.
  void cancel() {
    cancelled_ = true;
    plain_.SetTerminate();
    shrinking_.SetTerminate();
  }

  /// What `body` returns. Throws Cancelled, whatever it returned or threw, if the stream was cancelled meanwhile or
  /// before.
  template <class Body>
  auto guard(const Body& body) {
    struct Scope {
      ~Scope() { current() = before; }
      const Cancellation* before;
    } const scope{current()};
    current() = this;
    try {
      check();
      auto result = body();
      check();
      return result;
    } catch (...) {
      check();
      throw;
    }
  }

  /// Whether this thread's stream was cancelled: onnxruntime then ends a run with an error like any other.
  static bool is_cancelled() { return current() && current()->cancelled_; }

  /// Options of a run on this thread.
  static const Ort::RunOptions& plain() { return here().plain_; }

  /// Options of a run after which the arena frees its unused memory.
  static const Ort::RunOptions& shrinking() { return here().shrinking_; }

 private:
  void check() const {
    if (cancelled_) throw Cancelled();
  }

  static const Cancellation*& current() {
    static thread_local const Cancellation* stream = nullptr;
    return stream;
  }

  /// This thread's, or one for runs that belong to no stream.
  static const Cancellation& here() {
    static const Cancellation never;
    return current() ? *current() : never;
  }

  Ort::RunOptions plain_, shrinking_;
  std::atomic<bool> cancelled_{false};
};

}  // namespace autosteer
