// Lossless speculative decoding without a second model: the C++ side of runtime/drafting.py. What an answer copies is
// drafted from the text, what the model often says from the package's table (draft_table.hpp). The sampler then goes
// through the logits in order and samples as it would without a draft. So a draft changes an answer's cost, not its
// text.
//
//     text so far   ... the red sign is locked ... >the red<    the latest earlier occurrence of its last 1 to 4 tokens
//     draft                     sign is locked                  what followed there, fed after the last token
//     logits        (R, V), a row for every token fed           one decoder pass reads the weights once for all of them
//
// The drafter learns how far to trust a match of n tokens, and the table, from every token of the answer, drafted or
// not. It has no clock and sums in Python's order, so both languages draft the same.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "draft_table.hpp"

namespace autosteer {

/// The cost of one more position in a decoder pass, relative to a pass of one, by the decoder's precision (drafting.py
/// says how it was measured).
inline const std::map<std::string, double>& position_costs() {
  static const std::map<std::string, double> costs = {{"fp32", 0.08}, {"fp16", 0.08}, {"int8", 0.12}, {"int4", 0.22}};
  return costs;
}

/// Drafts the next tokens of one answer.
class Drafter {
 public:
  static constexpr int64_t kMaxDraft = 16;  // tokens

  /// `prompt`: the text tokens before the answer. `position_cost`: see position_costs. `table`: the package's, if it
  /// has one; it must outlive this.
  Drafter(const std::vector<int64_t>& prompt, double position_cost, const DraftTable* table = nullptr)
      : position_cost_(position_cost), table_(table) {
    for (size_t n = 0; n < kTrust.size(); ++n) hits_[n] = kTrust[n] * kWeight;
    tries_.fill(kWeight);
    for (const int64_t token : prompt) append(token);
    find();
    expected_ = look_up({});
  }

  /// Append `token` to the text and learn from it.
  void push(int64_t token) {
    const bool hit = matched_ > 0 && text_[source_] == token;
    if (matched_) learn(hit);
    if (expected_) {
      told_ += expected_->chance;
      if (expected_->token == token) true_ += 1.0;
    }
    append(token);
    source_ = hit ? source_ + 1 : 0;
    matched_ = hit ? matched_ + 1 : 0;
    if (matched_ < kNgram) find();
    expected_ = look_up({});
  }

  /// The tokens worth verifying along with the last one: at most `limit`, often none.
  ///
  /// Each is the likelier of two: what the text has after the matched tokens, and what the table has. From the first
  /// that is only the table's, the text's no longer counts.
  std::vector<int64_t> draft(int64_t limit) const {
    const auto most = static_cast<size_t>(std::max<int64_t>(0, std::min(limit, kMaxDraft)));
    size_t best = 0;
    double best_speed = kGain, pass_cost = 1.0, tokens = 1.0, likely = 1.0;
    std::vector<int64_t> out;
    bool copying = matched_ > 0;
    while (out.size() < most && likely > position_cost_ * best_speed) {  // else more cannot pay
      Expected next = {-1, 0.0};
      if (copying) next = {copied(out), trust(matched_ + out.size())};
      const std::optional<Expected> found = out.empty() ? expected_ : look_up(out);
      if (found) {
        const double told = found->chance * std::min(1.0, true_ / told_);
        if (told > next.chance) {
          copying = copying && next.token == found->token;
          next = {found->token, told};
        }
      }
      if (next.chance == 0.0) break;
      out.push_back(next.token);
      pass_cost += position_cost_;
      likely *= next.chance;
      tokens += likely;
      if (tokens / pass_cost > best_speed) {
        best = out.size();
        best_speed = tokens / pass_cost;
      }
    }
    out.resize(best);
    return out;
  }

 private:
  static constexpr size_t kNgram = 4;  // longest match that is looked up; a match grows while the answer keeps copying
  static constexpr double kWeight = 3.0;  // of the prior, in observed tokens
  /// Decay of old observations at each new one: an answer may begin or stop copying.
  static constexpr double kMemory = 0.95;
  static constexpr double kGain = 1.05;  // least expected speed-up of a draft
  /// Tokens for which the table's chances are believed before they are compared with an answer.
  static constexpr double kTableWeight = 4.0;
  /// Prior probability that the next token matches, by match length.
  static constexpr std::array<double, 9> kTrust = {0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.7, 0.8, 0.8};

  using Ngram = std::array<int64_t, kNgram>;  // shorter ones begin with -1, which is no token

  static size_t bucket(size_t matched) { return std::min(matched, kTrust.size() - 1); }

  double trust(size_t matched) const { return hits_[bucket(matched)] / tries_[bucket(matched)]; }

  void learn(bool hit) {
    const size_t n = bucket(matched_);
    const double prior = kWeight * (1 - kMemory);  // replaces what decays: trust never reaches 0 or 1
    hits_[n] = hits_[n] * kMemory + (hit ? 1.0 : 0.0) + prior * kTrust[n];
    tries_[n] = tries_[n] * kMemory + 1 + prior;
  }

  /// The text's token for the place behind `draft`; past the end of the text, copy from the draft itself.
  int64_t copied(const std::vector<int64_t>& draft) const {
    const size_t at = source_ + draft.size();
    return at < text_.size() ? text_[at] : draft[at - text_.size()];
  }

  /// What the table has to follow text and `draft`.
  std::optional<Expected> look_up(const std::vector<int64_t>& draft) const {
    return table_ ? table_->next(text_, draft) : std::nullopt;
  }

  /// The text's last `n` tokens.
  Ngram last(size_t n) const {
    Ngram ngram;
    ngram.fill(-1);
    std::copy(text_.end() - static_cast<std::ptrdiff_t>(n), text_.end(), ngram.end() - static_cast<std::ptrdiff_t>(n));
    return ngram;
  }

  /// Append `token`, and index the n-grams before it.
  void append(int64_t token) {
    for (size_t n = 1; n <= std::min(kNgram, text_.size()); ++n) after_[last(n)] = text_.size();
    text_.push_back(token);
  }

  /// Find the latest earlier occurrence of the text's last kNgram tokens, or else of fewer.
  void find() {
    for (size_t n = std::min(kNgram, text_.size()); n > matched_; --n) {
      const auto place = after_.find(last(n));
      if (place == after_.end()) continue;
      source_ = place->second;
      matched_ = n;
      const auto before = [&](size_t end) { return text_[end - matched_ - 1]; };
      while (matched_ < std::min(source_, kTrust.size()) && before(source_) == before(text_.size())) ++matched_;
      return;
    }
  }

  double position_cost_;
  const DraftTable* table_;
  std::optional<Expected> expected_;                   // what the table has to follow the text
  double told_ = kTableWeight, true_ = kTableWeight;  // its chances so far, and how many came true
  std::vector<int64_t> text_;
  std::map<Ngram, size_t> after_;    // n-gram -> index after its latest earlier occurrence
  size_t source_ = 0, matched_ = 0;  // text_[source_...] is expected next: `matched_` tokens match before it
  std::array<double, kTrust.size()> hits_{}, tries_{};
};

}  // namespace autosteer
