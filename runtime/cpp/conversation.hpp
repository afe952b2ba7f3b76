// What the turns of one dialogue need not compute again: keys and values of earlier rows, and the rows of its pictures
// and videos. The C++ side of runtime/conversation.py.
//
//     autosteer::Conversation conversation;
//     engine.generate(messages, sampling, policy, {}, &conversation);   // the first turn
//     engine.generate(longer, sampling, policy, {}, &conversation);     // runs what is new
//
// Nothing is assumed of the messages. A new prompt is compared with the rows that were computed, token by token and
// picture by picture, and starts where they part: an edited turn, another system prompt or an answer that tokenises
// otherwise just reuse less. The gate judges the last turn by rows that are always computed anew, and earlier ones of
// the user's by what it read of them when they came: what was unsafe stays so while it is part of the dialogue. Leave
// out turns that were refused, and the next ones are judged by themselves. Steering bends what comes out of the last
// layer and nothing that is kept.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "image.hpp"
#include "request.hpp"

namespace autosteer {

class Engine;

/// What stands for pictures and videos in a prompt, by digest.
using Encoded = std::map<std::string, std::shared_ptr<const std::vector<Laid>>>;

/// The memory of one dialogue, with the engine that used it first and that must outlive it. One thread at a time; a
/// second stream at the same time finds it empty, and is slower. It must outlive its streams.
class Conversation {
 public:
  Conversation() = default;
  Conversation(const Conversation&) = delete;
  Conversation& operator=(const Conversation&) = delete;

  /// Whether it is `engine`'s; it is from now on if it was nobody's.
  bool belongs_to(const Engine& engine) {
    if (!engine_) engine_ = &engine;
    return engine_ == &engine;
  }

  /// What earlier turns have computed; a request that takes it writes into it, so it can be taken once.
  std::optional<Computed> take() { return std::exchange(computed_, std::nullopt); }

  /// Put back what a request that is over leaves.
  void keep(Computed computed) { computed_ = std::move(computed); }

  Encoded images;  ///< the latest prompt's

 private:
  const Engine* engine_ = nullptr;
  std::optional<Computed> computed_;
};

}  // namespace autosteer
