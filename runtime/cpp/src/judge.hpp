// What the prober is asked about a dialogue, and about an answer that its request dictates. The C++ side of
// runtime/judge.py.
//
//     prompt   every turn that is not trusted, where it stands; a user's turn by itself, too
//     answer   as if the user had said it, and its beginnings
//
// A harmless question that was answered before can draw the prober's eye from a request that it catches by itself. And
// biased tokens, which may leave out the one that ends the answer, can drown what it begins with. The worst score
// counts.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "audit.hpp"
#include "conversation.hpp"
#include "errors.hpp"
#include "gate.hpp"
#include "generation.hpp"
#include "prompt_encoder.hpp"
#include "text.hpp"

namespace autosteer {

constexpr size_t kFirstWords = 16;  // of the shortest beginning that is judged

/// ASCII white space.
inline bool is_space(char c) { return c == ' ' || ('\t' <= c && c <= '\r'); }

/// The text up to its 16th, 32nd, 64th, ... word, and the whole. Words end at ASCII white space.
inline std::vector<std::string> beginnings(const std::string& text) {
  std::vector<std::string> found;
  size_t words = 0, next = kFirstWords;
  for (size_t at = 0; at < text.size(); ++at) {
    const bool ends = !is_space(text[at]) && at + 1 < text.size() && is_space(text[at + 1]);
    if (!ends || ++words < next) continue;
    found.push_back(text.substr(0, at + 1));
    next *= 2;
  }
  found.push_back(text);
  return found;
}

/// Asks a package's prober. What it is given must outlive it.
class Judge {
 public:
  /// Makes a request that gives no answer.
  using Ask = std::function<Request(EncodedPrompt, Stats&)>;

  Judge(const PromptEncoder& encoder, Ask ask, int split_layer, const Log& log)
      : encoder_(encoder), ask_(std::move(ask)), split_layer_(split_layer), log_(log) {}

  /// The verdict on the prompt of `request`, noted in `record`, which has its messages. `conversation` knows the scores
  /// of its turns by themselves, and their pictures.
  Verdict prompt(Request& request, Record& record, const GatePolicy& policy, Conversation* conversation) const {
    Verdict verdict = request.prefill_lower(policy);
    const Clock clock;
    const std::vector<Message>& messages = record.messages;
    record.scores = request.scores;
    std::map<std::vector<Key>, double> known;
    if (verdict.p_unsafe && messages.size() > 1) {
      double p_unsafe = *verdict.p_unsafe;
      size_t at = 0, pictures = 0;
      for (const Message& message : messages) {
        for (const Part& part : message.parts) pictures += std::holds_alternative<ImageLike>(part);
      }
      for (size_t turn = 0; turn < messages.size(); ++turn) {
        if (!is_judged(messages, turn)) continue;
        double& score = record.scores[at++];
        if (turn == 0) continue;  // what stands first is read alike by itself: nothing is before it
        if (messages[turn].role != "user") continue;
        const double p = by_itself(messages[turn], pictures > 1, policy, conversation, known);
        score = worse(score, p);
        p_unsafe = worse(p_unsafe, p);
      }
      verdict = decide(p_unsafe, policy, split_layer_);
      record.stats.gate_ms += clock.ms();
    }
    if (conversation) conversation->alone = std::move(known);
    record.verdict = verdict;
    return verdict;
  }

  /// The worst p_unsafe of an answer and of its beginnings, each as a user's prompt; NaN if one cannot be read.
  double answer(const std::string& text, const GatePolicy& policy) const {
    double p_unsafe = 0.0;
    try {
      for (const std::string& said : beginnings(text)) {
        Stats stats;
        p_unsafe = worse(p_unsafe, score(encoder_.prepare({Message::user(said)}, stats), policy, stats));
      }
    } catch (const InputError& err) {
      const std::string reason = err.what();
      if (log_) log_("the answer could not be judged; it counts as unsafe (" + reason + ")");
      return std::nan("");
    }
    return p_unsafe;
  }

 private:
  /// p_unsafe of a user's turn as a prompt of its own; NaN if it is none that fits. Noted in `known`, if it is a
  /// number: a failure may pass. `several`: the dialogue has several pictures, so this turn's are encoded as there.
  double by_itself(const Message& turn, bool several, const GatePolicy& policy, const Conversation* conversation,
                   std::map<std::vector<Key>, double>& known) const {
    Conversation aside;
    if (conversation) aside.images = conversation->images;  // not encoded again
    Stats own;
    std::optional<EncodedPrompt> alone;
    try {
      alone = encoder_.prepare(std::vector<Message>(1, turn), own, &aside, several);
    } catch (const InputError& err) {
      const std::string reason = err.what();
      if (log_) log_("a turn could not be judged by itself; the prompt counts as unsafe (" + reason + ")");
      return std::nan("");
    }
    const std::vector<Key> key = alone->keys;
    if (const auto found = known.find(key); found != known.end()) return found->second;
    double p = std::nan("");
    const auto before = conversation ? conversation->alone.find(key) : known.end();
    if (conversation && before != conversation->alone.end()) {
      p = before->second;
    } else {
      p = score(std::move(*alone), policy, own);
    }
    if (!std::isnan(p)) known[key] = p;
    return p;
  }

  double score(EncodedPrompt as_prompt, const GatePolicy& policy, Stats& stats) const {
    return ask_(std::move(as_prompt), stats).prefill_lower(policy).p_unsafe.value_or(std::nan(""));
  }

  const PromptEncoder& encoder_;
  const Ask ask_;
  const int split_layer_;
  const Log& log_;
};

}  // namespace autosteer
