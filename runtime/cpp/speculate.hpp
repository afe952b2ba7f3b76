// Lossless speculation by prompt lookup: the C++ side of runtime/drafting.py. An answer that copies is drafted from
// where the text stands already; the sampler then goes through the drafted tokens' logits in order and draws as it
// would without a draft. So a draft changes what an answer costs and never what it says.
//
//     text so far   ... the red sign is locked ... >the red<     the latest occurrence of its last tokens, 4 at best
//     draft                     sign is locked                   what followed there, fed behind the last token
//     logits        one row for every drafted token              one pass of the decoder reads its weights once for all
//
// How far a match of n tokens can be trusted is learnt from every token of the answer, drafted or not. No clock, and
// sums in Python's order: the same text is drafted the same way in both languages.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace autosteer {

/// What one more row of a pass costs, in passes of one row: by the decoder's precision, measured (drafting.py).
inline const std::map<std::string, double> kRowCost = {{"fp32", 0.08}, {"fp16", 0.08}, {"int8", 0.12}, {"int4", 0.22}};

/// Drafts the next tokens of one answer.
class Drafter {
 public:
  static constexpr int64_t kMost = 16;  // tokens of one draft

  /// `prompt`: the text tokens before the answer. `row_cost`: of one more row in a pass, in passes.
  Drafter(const std::vector<int64_t>& prompt, double row_cost) : row_cost_(row_cost) {
    for (size_t n = 0; n < kTrust.size(); ++n) hits_[n] = kTrust[n] * kWeight;
    tries_.fill(kWeight);
    for (const int64_t token : prompt) append(token);
    find();
  }

  /// The answer went on with `token`.
  void push(int64_t token) {
    const bool hit = matched_ > 0 && text_[source_] == token;
    if (matched_) learn(hit);
    append(token);
    source_ = hit ? source_ + 1 : 0;
    matched_ = hit ? matched_ + 1 : 0;
    if (matched_ < kNgram) find();
  }

  /// The tokens that pay to be verified along with the last one: at most `limit`, often none.
  std::vector<int64_t> draft(int64_t limit) const {
    const int64_t most = matched_ ? std::min(limit, kMost) : 0;
    size_t best = 0;
    double best_speed = kGain, pass_cost = 1.0, tokens = 1.0, likely = 1.0;
    for (int64_t drafted = 1; drafted <= most; ++drafted) {
      const auto count = static_cast<size_t>(drafted);
      pass_cost += row_cost_;
      likely *= trust(matched_ + count - 1);
      tokens += likely;
      if (tokens / pass_cost > best_speed) {
        best = count;
        best_speed = tokens / pass_cost;
      }
    }
    std::vector<int64_t> out;
    for (size_t at = source_; at < source_ + best; ++at) {  // a source that reaches the end goes on in the draft
      out.push_back(at < text_.size() ? text_[at] : out[at - text_.size()]);
    }
    return out;
  }

 private:
  static constexpr size_t kNgram = 4;      // longest match that is looked up; a copy in progress matches further
  static constexpr double kWeight = 3.0;   // tokens that kTrust counts for
  static constexpr double kMemory = 0.95;  // per comparison: an answer may begin or cease to copy
  static constexpr double kGain = 1.05;    // a draft must promise this many times the speed without
  /// By tokens matched: how many go on alike, before it is learnt.
  static constexpr std::array<double, 9> kTrust = {0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.7, 0.8, 0.8};

  using Ngram = std::array<int64_t, kNgram>;  // shorter ones begin with -1, which is no token

  static size_t bucket(size_t matched) { return std::min(matched, kTrust.size() - 1); }

  double trust(size_t matched) const { return hits_[bucket(matched)] / tries_[bucket(matched)]; }

  void learn(bool hit) {
    const size_t n = bucket(matched_);
    const double prior = kWeight * (1 - kMemory);  // what memory loses, it regains: trust never becomes certainty
    hits_[n] = hits_[n] * kMemory + (hit ? 1.0 : 0.0) + prior * kTrust[n];
    tries_[n] = tries_[n] * kMemory + 1 + prior;
  }

  /// The text's last `n` tokens.
  Ngram last(size_t n) const {
    Ngram ngram;
    ngram.fill(-1);
    std::copy(text_.end() - static_cast<std::ptrdiff_t>(n), text_.end(), ngram.end() - static_cast<std::ptrdiff_t>(n));
    return ngram;
  }

  /// Note what the n-grams at the text's end went on with: `token`.
  void append(int64_t token) {
    for (size_t n = 1; n <= std::min(kNgram, text_.size()); ++n) after_[last(n)] = text_.size();
    text_.push_back(token);
  }

  /// The latest place where the text's last kNgram tokens stood before; else fewer of them.
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

  double row_cost_;
  std::vector<int64_t> text_;
  std::map<Ngram, size_t> after_;    // n-gram -> where its latest occurrence but the text's end went on
  size_t source_ = 0, matched_ = 0;  // text_[source_...] is expected next, as `matched_` tokens before it did come
  std::array<double, kTrust.size()> hits_{}, tries_{};
};

}  // namespace autosteer
