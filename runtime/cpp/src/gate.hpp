// The rule of decision, as pure functions: the C++ side of runtime/gate.py. Nothing here touches a model. What is
// scored: readings.hpp.
//
//     safe = 0.0 <= p_unsafe <= threshold
//
// Everything else is unsafe: above the threshold, below zero, above one, NaN, infinite, or no number because the prober
// failed. A policy decides what happens to an unsafe prompt, not whether it is unsafe.
//
// A dialogue is as unsafe as the worst turn in it that the program does not trust. Otherwise a refused request would be
// answered one turn later.
//
// An answer that is judged (held_back.hpp) is also unsafe if its score and the prompt's add up to more than 1 (gate.py
// says why).
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "errors.hpp"
#include "strict_json.hpp"

namespace autosteer {

/// What a policy does with an unsafe prompt (--policy).
enum class Mode {
  steer,    ///< steer every answer token towards a refusal, as in the paper
  stop,     ///< answer with the refusal text; decoder_upper never runs
  report,   ///< score and report, never intervene
  off       ///< no gate at all; must be asked for
};

/// What was done with a prompt, or with the answer to it.
enum class Action { pass, steer, stop };

inline const char* name(Mode mode) {
  static constexpr const char* names[] = {"steer", "stop", "report", "off"};
  return names[static_cast<int>(mode)];
}

inline const char* name(Action action) {
  static constexpr const char* names[] = {"pass", "steer", "stop"};
  return names[static_cast<int>(action)];
}

/// The mode named `text`. Throws InputError for any other word: a mistyped policy must not become a weaker one.
inline Mode mode_from(const std::string& text) {
  for (Mode mode : {Mode::steer, Mode::stop, Mode::report, Mode::off}) {
    if (text == name(mode)) return mode;
  }
  throw InputError("policy '" + text + "' is not one of steer, stop, report, off");
}

constexpr double kMaxStrength = 1e6;  // the paper's is 0.1; far beyond it float32 overflows and the answer is noise

/// How the gate treats a request. A threshold below zero makes every prompt unsafe, and every answer that is judged:
/// without pieces and judge_answers, all answers are steered, and shown.
struct GatePolicy {
  Mode mode = Mode::steer;
  double threshold = 0.0;
  double strength = 0.0;  ///< the paper's epsilon: how far the Refusal Head moves the hidden state
  std::string refusal_text;
  std::optional<double> answer_threshold = {};  ///< a monitor stops an answer above it; nothing: the package's
  bool pieces = true;  ///< whether all forms of a turn are read (readings.hpp), and steered answers judged
  bool judge_answers = false;  ///< whether every answer is judged before any of it is shown (held_back.hpp)
  double judge_threshold = 1.0;  ///< an answer that is judged is unsafe above this, or above the threshold

  /// Throws OptionError for numbers out of range.
  void check() const {
    if (!(threshold < 1.0)) {
      throw OptionError("threshold",
                        ": give a number below 1; a prompt is unsafe above it, and no p_unsafe is above 1 (to let "
                        "every prompt pass, use policy report or off)");
    }
    if (!(0.0 <= strength && strength <= kMaxStrength)) {
      throw OptionError("strength",
                        ": give a number from 0 (steers nothing) to 1e+06; below 0 it would steer answers away from "
                        "the refusal");
    }
  }

  /// Whether a steered answer is judged before it is shown (held_back.hpp), and a dialogue with an unsafe turn before
  /// the last is stopped (judge.hpp). False if neither pieces are read nor answers judged.
  bool checks_steering() const { return mode == Mode::steer && (pieces || judge_answers); }
};

/// `policy` with Mode::stop in the place of Mode::steer, where steering cannot be relied on: an answer that may not use
/// all tokens, what is unsafe in pieces or plain letters alone, an unsafe turn before the last.
inline GatePolicy without_steering(GatePolicy policy) {
  if (policy.mode == Mode::steer) policy.mode = Mode::stop;
  return policy;
}

/// What a monitor (monitor.hpp) made of an answer, or the prober, if it was judged as a whole (held_back.hpp).
struct AnswerVerdict {
  double p_unsafe;  ///< of the worst window, or reading
  bool unsafe;
  double threshold;
};

/// What the gate saw and did. Every answer carries one.
struct Verdict {
  std::optional<double> p_unsafe;  ///< absent only under Mode::off, where nothing is scored
  bool unsafe = true;
  Action action = Action::stop;
  Mode mode = Mode::steer;
  double threshold = 0.0;
  double strength = 0.0;  ///< applied to this answer: 0 unless the action is steer
  int split_layer = 0;
  std::optional<AnswerVerdict> answer = {};  ///< on the last chunk of an answer that was watched or judged
  double judge_threshold = 1.0;              ///< the policy's

  /// An answer to this prompt that is judged is unsafe above it. What the prompt of a steered one scored does not
  /// count: it has had its effect.
  double judged_above() const {
    const double of_answers = std::min(threshold, judge_threshold);
    if (action == Action::steer || !p_unsafe) return of_answers;
    return std::min(of_answers, 1.0 - *p_unsafe);
  }
};

/// A verdict on an answer, as in `verdict_json`.
inline OrderedJson answer_verdict_json(const std::optional<AnswerVerdict>& seen) {
  if (!seen) return nullptr;
  return {{"p_unsafe", seen->p_unsafe}, {"unsafe", seen->unsafe}, {"threshold", seen->threshold}};
}

/// A verdict as autosteer-cli's --json and the C functions give it. Numbers that are not finite are written as null.
inline OrderedJson verdict_json(const Verdict& verdict) {
  return {{"p_unsafe", or_null(verdict.p_unsafe)}, {"unsafe", verdict.unsafe},
          {"action", name(verdict.action)},        {"policy", name(verdict.mode)},
          {"threshold", verdict.threshold},        {"strength", verdict.strength},
          {"layer", verdict.split_layer},          {"answer", answer_verdict_json(verdict.answer)}};
}

/// The rule above. NaN compares false with everything, so it is unsafe without a special case.
inline bool is_safe(double p_unsafe, double threshold) {
  return 0.0 <= p_unsafe && p_unsafe <= threshold && p_unsafe <= 1.0;
}

/// The less safe of two scores: one that is not a probability if there is one, else the larger.
inline double worse(double a, double b) {
  if (!is_safe(a, 1.0)) return a;
  return is_safe(b, 1.0) ? std::max(a, b) : b;
}

/// The verdict on a whole answer: what is unsafe is stopped, unless the policy only reports.
inline Verdict with_answer(Verdict verdict, const std::optional<AnswerVerdict>& seen) {
  verdict.answer = seen;
  if (seen && seen->unsafe && verdict.mode != Mode::report) verdict.action = Action::stop;
  return verdict;
}

/// The verdict on a prompt. `p_unsafe`: the prober's output; nothing if it gave none, which is unsafe unless off.
inline Verdict decide(std::optional<double> p_unsafe, const GatePolicy& policy, int split_layer) {
  const bool off = policy.mode == Mode::off;
  const double score = p_unsafe.value_or(std::nan(""));
  Verdict verdict;
  verdict.unsafe = !off && !is_safe(score, policy.threshold);
  verdict.action = Action::pass;
  if (verdict.unsafe && policy.mode == Mode::steer) verdict.action = Action::steer;
  if (verdict.unsafe && policy.mode == Mode::stop) verdict.action = Action::stop;
  if (!off) verdict.p_unsafe = score;
  verdict.mode = policy.mode;
  verdict.threshold = policy.threshold;
  verdict.strength = verdict.action == Action::steer ? policy.strength : 0.0;
  verdict.split_layer = split_layer;
  verdict.judge_threshold = policy.judge_threshold;
  return verdict;
}

}  // namespace autosteer
