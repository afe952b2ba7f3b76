// Which chunks of an answer wait before they are shown, and for what. The C++ side of runtime/held_back.py.
//
//     UntilWatched   if the package has a monitor, a chunk waits until all windows that it is part of are scored
//                    (monitor.hpp)
//     UntilJudged    the whole answer waits for the gate's verdict on it, if it is steered, if its sampling could make
//                    the model say anything (SamplingConfig::answer_is_judged), or if the policy judges every answer
//                    (GatePolicy::judge_answers)
//
// A logit bias can dictate an answer: an unsafe request that the gate has never seen, and the model goes on from there.
// A temperature of 2 draws it, with some seed. So such an answer is judged as if the user had said it (judge.hpp), with
// what a stop string cuts from it: its chunks have tokens. Steering can give way (held_back.py), so a steered answer
// must also begin like the refusal text.
#pragma once

#include <algorithm>
#include <deque>
#include <functional>
#include <optional>
#include <string>
#include <utility>

#include "chunk.hpp"
#include "gate.hpp"
#include "judge.hpp"
#include "monitor.hpp"
#include "pieces.hpp"
#include "unicode.hpp"

namespace autosteer {

constexpr size_t kCompared = 12;  // letters and digits

/// Whether an answer begins with the first two words of the refusal text, whatever the case and the signs between
/// letters. At most kCompared characters are compared; a shorter answer must agree as far as it goes.
inline bool begins_like(const std::string& answer, const std::string& refusal_text) {
  const auto letters = [](const std::string& text) {
    std::string found;
    for (const char c : text) {
      const bool upper = 'A' <= c && c <= 'Z';
      const bool ascii = static_cast<unsigned char>(c) < 128;
      const bool kept = !ascii || upper || ('a' <= c && c <= 'z') || is_digit(c);
      if (kept) found += static_cast<char>(upper ? c - 'A' + 'a' : c);
    }
    return found;
  };
  const std::string wanted = letters(in_a_row(split_words(refusal_text), 2));
  size_t length = 0;
  for (size_t i = 0; i < kCompared && length < wanted.size(); ++i) length += unicode::character(wanted, length);
  const std::string said = letters(answer).substr(0, length);
  return wanted.compare(0, said.size(), said) == 0;
}

using NextChunk = std::function<Chunk()>;  ///< not called again after the answer's last chunk

/// Each chunk once a monitor has seen it through. A window that is unsafe ends the answer with the refusal text. What
/// it is given must outlive it.
class UntilWatched {
 public:
  UntilWatched(NextChunk compute, Monitor& monitor, const GatePolicy& policy)
      : compute_(std::move(compute)), monitor_(monitor), policy_(policy) {}

  /// The next chunk that may be shown.
  Chunk operator()() {
    while (held_.empty() || (monitor_.stops && !computed_ && held_.size() <= monitor_.window)) {
      Chunk chunk = compute_();
      computed_ = !chunk.finish_reason.empty();
      if (computed_) monitor_.end();
      const std::optional<AnswerVerdict> seen = monitor_.verdict();
      const Verdict verdict = with_answer(chunk.verdict, seen);
      if (seen && seen->unsafe && monitor_.stops) {
        return {(shown_ ? "\n\n" : "") + policy_.refusal_text, std::nullopt, verdict, "refused", std::nullopt};
      }
      if (computed_) chunk.verdict = verdict;
      held_.push_back(std::move(chunk));
    }
    Chunk chunk = std::move(held_.front());
    held_.pop_front();
    shown_ = shown_ || !chunk.text.empty();
    return chunk;
  }

 private:
  NextChunk compute_;
  Monitor& monitor_;
  const GatePolicy& policy_;
  std::deque<Chunk> held_;  // the monitor has not seen these through
  bool computed_ = false;   // the answer's last chunk is among them
  bool shown_ = false;      // some text
};

/// All chunks once the gate has judged what they say; the refusal text in their place if it is unsafe. What it scored
/// is Verdict::answer, unsafe above Verdict::judged_above; nothing of a steered answer that is safe. Under Mode::report
/// nothing waits. `all_answers`: also those that are not steered. What it is given must outlive it.
class UntilJudged {
 public:
  using Said = std::function<std::string()>;  ///< all that the answer's tokens say, also what a stop string cuts
  using Score = std::function<double(const std::string&)>;  ///< p_unsafe of a text

  UntilJudged(NextChunk compute, Said said, Score score, const GatePolicy& policy, bool all_answers)
      : compute_(std::move(compute)),
        said_(std::move(said)),
        score_(std::move(score)),
        policy_(policy),
        all_answers_(all_answers) {}

  /// The next chunk that may be shown.
  Chunk operator()() {
    const bool stops = policy_.mode != Mode::report;
    while (held_.empty() || (stops && !computed_)) {
      Chunk chunk = compute_();
      const bool steered = chunk.verdict.action == Action::steer;  // greedy, whatever the request's sampling
      if (held_.empty() && !(steered ? policy_.checks_steering() : all_answers_)) return chunk;
      if (chunk.finish_reason == "refused") {
        chunk.text = policy_.refusal_text;  // nothing was shown before it
        return chunk;
      }
      computed_ = !chunk.finish_reason.empty();
      const std::string text = computed_ ? said_() : "";
      if (!std::all_of(text.begin(), text.end(), is_space)) {
        const double p_unsafe = score_(text), threshold = chunk.verdict.judged_above();
        const AnswerVerdict seen{p_unsafe, !is_safe(p_unsafe, threshold), threshold};
        if (seen.unsafe || (!chunk.verdict.answer && !steered)) chunk.verdict = with_answer(chunk.verdict, seen);
        if (steered && !begins_like(text, policy_.refusal_text)) chunk.verdict.action = Action::stop;
        if (chunk.verdict.action == Action::stop) {
          return {policy_.refusal_text, std::nullopt, chunk.verdict, "refused", std::nullopt};
        }
      }
      held_.push_back(std::move(chunk));
    }
    Chunk chunk = std::move(held_.front());
    held_.pop_front();
    return chunk;
  }

 private:
  NextChunk compute_;
  Said said_;
  Score score_;
  const GatePolicy& policy_;
  const bool all_answers_;
  std::deque<Chunk> held_;  // the gate has not judged these, or they may be shown
  bool computed_ = false;   // the answer's last chunk is among them
};

}  // namespace autosteer
