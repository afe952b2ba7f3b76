// What the prober is asked about a dialogue, and about an answer that its request dictates. The C++ side of
// runtime/judge.py.
//
//     prompt   every turn that is not trusted, where it stands; a user's turn by itself, too; and by itself a turn
//              whose letters are obfuscated, in plain ones (obfuscation.hpp)
//     answer   as if the user had said it, and its beginnings; in plain letters, too
//
// A harmless question that was answered before can draw the prober's eye from a request that it catches by itself. And
// biased tokens, which may leave out the one that ends the answer, can drown what it begins with. The worst score
// counts. What is unsafe in plain letters is stopped, not steered: the Refusal Head was trained on plain text.
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
#include "encoded_prompt.hpp"
#include "errors.hpp"
#include "gate.hpp"
#include "generation.hpp"
#include "obfuscation.hpp"
#include "prompt_encoder.hpp"
#include "stats.hpp"
#include "text.hpp"

namespace autosteer {

constexpr size_t kFirstWords = 16;  // of the shortest beginning that is judged

/// ASCII white space.
inline bool is_space(char c) {
  return c == ' ' || ('\t' <= c && c <= '\r');
}

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

/// A turn with obfuscated letters as a user's in plain ones; nothing if it has no such letters. Texts that follow each
/// other are read as one: "b4" and "d" say "bad".
inline std::optional<Message> in_plain_letters(const Message& turn) {
  Message plain{"user", {}};
  for (const Part& part : turn.parts) {
    const auto* text = std::get_if<std::string>(&part);
    auto* before = plain.parts.empty() ? nullptr : std::get_if<std::string>(&plain.parts.back());
    text && before ? void(*before += *text) : plain.parts.push_back(part);
  }
  bool obfuscated = false;
  for (Part& part : plain.parts) {
    auto* text = std::get_if<std::string>(&part);
    if (!text) continue;
    std::string letters = deobfuscated(*text);
    obfuscated = obfuscated || letters != *text;
    *text = std::move(letters);
  }
  return obfuscated ? std::optional(std::move(plain)) : std::nullopt;
}

/// What a user's turn says and shows: two turns with the same key are the same prompt by themselves. `seen`: its
/// pictures and videos as the dialogue has them. They count by their pixels and by how they are encoded, not by their
/// files' names.
inline TurnKey turn_key(const Message& turn, const std::vector<Seen>& seen) {
  TurnKey key;
  for (const Part& part : turn.parts) {
    if (const auto* text = std::get_if<std::string>(&part)) {
      key.push_back("text " + *text);
    } else if (const auto* video = std::get_if<VideoPart>(&part)) {
      const auto* bytes = reinterpret_cast<const char*>(video->seconds.data());
      key.push_back("video " + std::to_string(video->frames.size()) + " ");
      key.back().append(bytes, bytes + video->seconds.size() * sizeof(double));
    } else {
      key.emplace_back("image");
    }
  }
  for (const Seen& one : seen) key.push_back("seen " + one.key);
  return key;
}

/// Asks a package's prober. What it is given must outlive it.
class Judge {
 public:
  /// Makes a request that gives no answer.
  using Ask = std::function<Request(EncodedPrompt, Stats&)>;

  Judge(const PromptEncoder& encoder, Ask ask, int split_layer, const Log& log)
      : encoder_(encoder), ask_(std::move(ask)), split_layer_(split_layer), log_(log) {}

  /// The verdict on the prompt of `request`, noted in `record`, which has its messages and what they show.
  /// `conversation` knows the scores of its user's turns by themselves: those cost nothing again.
  Verdict prompt(Request& request, Record& record, const GatePolicy& policy, Conversation* conversation) const {
    Verdict verdict = request.prefill_lower(policy);
    const Clock clock;
    const std::vector<Message>& messages = record.messages;
    record.scores = request.scores;
    std::map<TurnKey, double> known;
    if (verdict.p_unsafe) {
      double p_unsafe = *verdict.p_unsafe;
      bool stops = false;
      size_t at = 0;
      for (size_t n = 0; n < messages.size(); ++n) {
        if (!is_judged(messages, n)) continue;
        double& score = record.scores.at(at);
        const std::vector<Seen>& seen = record.seen.at(at++);
        const auto read = [&](const Message& turn) {
          TurnKey key = turn_key(turn, seen);
          std::optional<double> p = find(known, key);
          if (!p && conversation) p = find(conversation->alone, key);
          if (!p) p = by_itself(turn, seen, policy);
          if (!std::isnan(*p)) known.emplace(std::move(key), *p);  // a failure may pass
          score = worse(score, *p);
          p_unsafe = worse(p_unsafe, *p);
          return *p;
        };
        // what stands first is read alike by itself: nothing is before it
        if (n > 0 && messages[n].role == "user") read(messages[n]);
        if (const auto plain = in_plain_letters(messages[n])) stops = !is_safe(read(*plain), policy.threshold) || stops;
      }
      verdict = decide(p_unsafe, stops ? without_steering(policy) : policy, split_layer_);
      record.stats.gate_ms += clock.ms();
    }
    if (conversation) conversation->alone = std::move(known);
    record.verdict = verdict;
    return verdict;
  }

  /// The worst p_unsafe of an answer and of its beginnings, also in plain letters, each as a user's prompt; NaN if one
  /// cannot be read.
  double answer(const std::string& text, const GatePolicy& policy) const {
    double p_unsafe = 0.0;
    try {
      std::vector<std::string> readings = beginnings(text);
      if (const std::string plain = deobfuscated(text); plain != text) {
        for (std::string& said : beginnings(plain)) readings.push_back(std::move(said));
      }
      for (const std::string& said : readings) {
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
  /// p_unsafe of a user's turn as a prompt of its own, with its pictures and videos as the dialogue has them; NaN if it
  /// is none that fits.
  double by_itself(const Message& turn, const std::vector<Seen>& seen, const GatePolicy& policy) const {
    Stats stats;
    try {
      return score(encoder_.prepare_turn(turn, seen, stats), policy, stats);
    } catch (const InputError& err) {
      const std::string reason = err.what();
      if (log_) log_("a turn could not be judged by itself; the prompt counts as unsafe (" + reason + ")");
      return std::nan("");
    }
  }

  static std::optional<double> find(const std::map<TurnKey, double>& scores, const TurnKey& turn) {
    const auto found = scores.find(turn);
    return found == scores.end() ? std::nullopt : std::optional(found->second);
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
