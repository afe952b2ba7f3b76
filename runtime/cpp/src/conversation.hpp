// What the turns of one dialogue share: the KV caches of earlier positions, and the rows of its pictures and videos.
// The C++ side of runtime/conversation.py.
//
//     autosteer::Conversation conversation;
//     engine.generate(messages, sampling, policy, {}, &conversation);   // the first turn
//     engine.generate(longer, sampling, policy, {}, &conversation);     // runs only what is new
//
// You still pass all messages. A new prompt is compared with the cached one, token by token and picture by picture, and
// computed from the first difference on. An edited turn, another system prompt, or an answer that tokenises differently
// just reuses less.
//
// The positions that the prober reads of the last turn are never reused. For earlier turns, what the prober read
// when they came is kept. So a dialogue stays unsafe while an unsafe turn is part of it; leave refused turns out.
// Steering changes only the output of the last layer, never what is cached.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "generation.hpp"
#include "image.hpp"

namespace autosteer {

class Engine;

/// Identifies what the prober read of a turn; see `reading_key` in judge.hpp.
using ReadingKey = std::string;

/// Rows and token ids of pictures and videos, by digest.
using Encoded = std::map<std::string, std::shared_ptr<const std::vector<Laid>>>;

/// The cache of one dialogue. It belongs to the engine that used it first, which must outlive it. Not thread-safe. A
/// second stream at the same time finds it empty and computes all. It must outlive its streams.
class Conversation {
 public:
  Conversation() = default;
  Conversation(const Conversation&) = delete;
  Conversation& operator=(const Conversation&) = delete;

  /// Whether it belongs to `engine`, which becomes its owner if it has none.
  bool belongs_to(const Engine& engine) {
    if (!engine_) engine_ = &engine;
    return engine_ == &engine;
  }

  /// The cached prefix, if no request has it.
  const std::optional<CachedPrefix>& prefix() const { return prefix_; }

  /// Hand the cached prefix over to a request, which writes into it: none until `keep_prefix` brings one back.
  std::optional<CachedPrefix> take_prefix() { return std::exchange(prefix_, std::nullopt); }

  /// Store what a finished request leaves.
  void keep_prefix(CachedPrefix prefix) { prefix_ = std::move(prefix); }

  Encoded images;                             ///< of the latest prompt
  std::map<ReadingKey, double> known_scores;  ///< p_unsafe of readings of its turns; see judge.hpp

 private:
  const Engine* engine_ = nullptr;
  std::optional<CachedPrefix> prefix_;
};

}  // namespace autosteer
