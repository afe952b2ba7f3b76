// Logits -> the next token. The C++ side of runtime/sampling.py, with numpy's random numbers: a seed gives the same
// text in both languages.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "errors.hpp"

namespace autosteer {

constexpr double kMaxPenalty = 2.0, kMaxBias = 100.0;  // OpenAI's
/// Beyond these the demo says, with some seeds, what it never says.
constexpr double kOwnTemperature = 1.0, kLeastOwnRepetition = 1.0, kMostOwnRepetition = 1.05;

/// Sampling options for one answer. The default is greedy, so the same prompt gives the same answer.
struct SamplingConfig {
  int64_t max_tokens = 256;
  double temperature = 0.0;         ///< 0: greedy
  int64_t top_k = 0;                ///< keep the k most likely tokens; 0: all
  double top_p = 1.0;               ///< keep the smallest set of tokens with this much probability
  double repetition_penalty = 1.0;  ///< > 1 divides (positive) or multiplies (negative) logits of tokens already there
  double min_p = 0.0;               ///< keep tokens with this share of the likeliest one's probability
  double presence_penalty = 0.0;    ///< subtracted from the logit of each token already in the answer
  double frequency_penalty = 0.0;   ///< subtracted once for each time that it is already there
  std::map<int64_t, double> logit_bias;  ///< added to the logits of these token ids
  int64_t seed = 0;                 ///< same seed, same text
  std::vector<std::string> stop;    ///< end the answer before the first of these strings
  bool speculate = true;            ///< draft what the answer copies: faster; near ties may differ at int8 and int4

  /// Throws OptionError if a value is out of range.
  void check() const {
    const auto need = [](bool fits, const std::string& what, const std::string& range) {
      if (!fits) throw OptionError(what, " is out of range (" + range + ")");
    };
    const auto within = [](double most) {
      const std::string number = std::to_string(std::lround(most));
      return "from -" + number + " to " + number;
    };
    need(max_tokens >= 1, "max_tokens", "at least 1");
    need(temperature >= 0.0 && std::isfinite(temperature), "temperature", "at least 0, and finite");
    need(top_k >= 0, "top_k", "at least 0");
    need(top_p > 0.0 && top_p <= 1.0, "top_p", "above 0, at most 1");
    need(repetition_penalty > 0.0 && std::isfinite(repetition_penalty), "repetition_penalty", "above 0, and finite");
    need(min_p >= 0.0 && min_p <= 1.0, "min_p", "from 0 to 1");
    need(std::abs(presence_penalty) <= kMaxPenalty, "presence_penalty", within(kMaxPenalty));
    need(std::abs(frequency_penalty) <= kMaxPenalty, "frequency_penalty", within(kMaxPenalty));
    for (const auto& [token, bias] : logit_bias) {
      need(token >= 0 && std::abs(bias) <= kMaxBias, "logit_bias", "token ids, and " + within(kMaxBias));
    }
    need(seed >= 0, "seed", "at least 0");
    need(std::find(stop.begin(), stop.end(), "") == stop.end(), "stop", "texts that are not empty");
  }

  /// Whether it may leave out every token that a refusal begins with. Such an answer is not steered.
  bool restricts() const { return !logit_bias.empty(); }

  /// Whether it may make the model say what the model by itself hardly ever says (held_back.hpp).
  bool answer_is_judged() const {
    return restricts() || temperature > kOwnTemperature || repetition_penalty < kLeastOwnRepetition ||
           repetition_penalty > kMostOwnRepetition;
  }

  /// The same, but with the likeliest token each time. A steered answer is sampled so: by a temperature or a penalty,
  /// whoever writes the prompt could choose its way around the refusal.
  SamplingConfig greedy() const {
    SamplingConfig likeliest = *this;
    likeliest.temperature = likeliest.presence_penalty = likeliest.frequency_penalty = 0.0;
    likeliest.repetition_penalty = 1.0;
    return likeliest;
  }
};

/// numpy.random.default_rng(seed).random(): PCG64 (XSL-RR 128/64, O'Neill 2014), seeded by numpy's SeedSequence.
class Random {
 public:
  explicit Random(uint64_t seed) {
    const auto words = seed_words(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    const auto wide = [&](size_t i) { return uint128(words[i]) << 64 | words[i + 1]; };
    increment_ = wide(2) << 1 | 1;
    step();
    state_ += wide(0);
    step();
  }

  /// Uniform in [0, 1), 53 bits.
  double next() {
    step();
    const auto folded = static_cast<uint64_t>(state_ >> 64) ^ static_cast<uint64_t>(state_);
    const auto turn = static_cast<unsigned>(state_ >> 122);
    const uint64_t word = folded >> turn | folded << (-turn & 63);
    return static_cast<double>(word >> 11) * 0x1p-53;
  }

 private:
  __extension__ using uint128 = unsigned __int128;

  void step() { state_ = state_ * (uint128(0x2360ED051FC65DA4) << 64 | 0x4385DF649FCCF645) + increment_; }

  /// SeedSequence(entropy).generate_state(4, uint64)
  static std::vector<uint64_t> seed_words(uint32_t low, uint32_t high) {
    uint32_t constant = 0x43b0d7e5;
    const auto hash = [&](uint32_t value, uint32_t multiplier) {
      value ^= constant;
      constant *= multiplier;
      value *= constant;
      return value ^ value >> 16;
    };
    uint32_t pool[4] = {low, high, 0, 0};
    for (uint32_t& word : pool) word = hash(word, 0x931e8875);
    for (int from = 0; from < 4; ++from) {
      for (int to = 0; to < 4; ++to) {
        if (from == to) continue;
        const uint32_t mixed = 0xca01f9dd * pool[to] - 0x4973f715 * hash(pool[from], 0x931e8875);
        pool[to] = mixed ^ mixed >> 16;
      }
    }
    constant = 0x8b51f9dd;
    std::vector<uint64_t> words(4);
    for (size_t i = 0; i < 8; ++i) words[i / 2] |= uint64_t{hash(pool[i % 4], 0x58f38ded)} << 32 * (i % 2);
    return words;
  }

  uint128 state_ = 0, increment_ = 0;
};

class Sampler {
 public:
  explicit Sampler(const SamplingConfig& config) : config_(config), random_(static_cast<uint64_t>(config.seed)) {}

  /// The next token after `tokens`, which the penalties read: some the prompt's, too, the first `prompt_tokens`. Throws
  /// PackageError if the largest logit is NaN or infinite, InputError if a token of logit_bias is none of the model's.
  int64_t operator()(std::vector<float> logits, const std::vector<int64_t>& tokens, size_t prompt_tokens = 0) {
    if (config_.repetition_penalty != 1.0) penalise(logits, tokens);
    adjust(logits, tokens, prompt_tokens);
    const int64_t best = likeliest(logits);
    if (!std::isfinite(logits[static_cast<size_t>(best)])) {
      throw PackageError(
          "the model's logits are not finite: a strength too large, a damaged package, or an overflow in its "
          "precision");
    }
    if (config_.temperature == 0.0) return best;
    const std::vector<double> p = probabilities(logits);
    std::vector<double> cumulative(p.size());
    std::partial_sum(p.begin(), p.end(), cumulative.begin());
    const double total = cumulative.back();
    for (double& value : cumulative) value /= total;
    const auto found = std::upper_bound(cumulative.begin(), cumulative.end(), random_.next());
    return std::min<int64_t>(found - cumulative.begin(), static_cast<int64_t>(p.size()) - 1);
  }

 private:
  /// HF: RepetitionPenaltyLogitsProcessor
  void penalise(std::vector<float>& logits, std::vector<int64_t> seen) const {
    std::sort(seen.begin(), seen.end());
    seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
    const auto penalty = static_cast<float>(config_.repetition_penalty);
    for (const int64_t token : seen) {
      float& logit = logits.at(static_cast<size_t>(token));
      logit = logit > 0 ? logit / penalty : logit * penalty;
    }
  }

  /// Add the bias; take from what the answer has presence_penalty once, and frequency_penalty for each time.
  void adjust(std::vector<float>& logits, const std::vector<int64_t>& tokens, size_t prompt_tokens) const {
    for (const auto& [token, bias] : config_.logit_bias) {
      if (token >= static_cast<int64_t>(logits.size())) {
        throw InputError("logit_bias: " + std::to_string(token) + " is no token of this model, which has " +
                         std::to_string(logits.size()));
      }
      logits[static_cast<size_t>(token)] += static_cast<float>(bias);
    }
    if (config_.presence_penalty == 0.0 && config_.frequency_penalty == 0.0) return;
    std::map<int64_t, int64_t> counts;
    for (size_t i = prompt_tokens; i < tokens.size(); ++i) ++counts[tokens[i]];
    for (const auto& [token, count] : counts) {
      const double penalty = config_.presence_penalty + config_.frequency_penalty * static_cast<double>(count);
      logits.at(static_cast<size_t>(token)) -= static_cast<float>(penalty);
    }
  }

  /// numpy.argmax: of equals the first; a NaN counts as the largest.
  static int64_t likeliest(const std::vector<float>& logits) {
    size_t best = 0;
    for (size_t i = 0; i < logits.size(); ++i) {
      if (std::isnan(logits[i])) return static_cast<int64_t>(i);
      if (logits[i] > logits[best]) best = i;
    }
    return static_cast<int64_t>(best);
  }

  /// Apply temperature, top-k, top-p and min-p: probabilities that sum to 1, zero for dropped tokens.
  std::vector<double> probabilities(const std::vector<float>& logits) const {
    const size_t n = logits.size();
    std::vector<size_t> order(n);
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logits[a] > logits[b]; });
    const auto best = static_cast<double>(logits[order[0]]);
    std::vector<double> p(n);
    double sum = 0.0;
    for (size_t i = 0; i < n; ++i) {
      const bool kept = config_.top_k == 0 || i < static_cast<size_t>(config_.top_k);
      p[i] = kept ? std::exp((static_cast<double>(logits[order[i]]) - best) / config_.temperature) : 0.0;
      sum += p[i];
    }
    std::vector<double> out(n);
    double cumulative = 0.0, left = 0.0;
    for (size_t i = 0; i < n; ++i) {
      const double share = p[i] / sum;
      cumulative += share;
      const bool likely = cumulative - share < config_.top_p && share >= config_.min_p * (p[0] / sum);
      const bool kept = i == 0 || likely;
      out[order[i]] = kept ? share : 0.0;
      left += out[order[i]];
    }
    for (double& share : out) share /= left;
    return out;
  }

  SamplingConfig config_;
  Random random_;
};

}  // namespace autosteer
