// One answer's state, from the gate to the last token: the C++ side of runtime/generation.py.
//
//     judge    decoder_lower over the prompt, the prober, the decision
//     begin    decoder_upper over the prompt, then the head: logits of the first answer token
//              (both through the prefill graphs where there are any: the same layers, their weights rounded otherwise)
//     verify   embed, lower, upper, head over the last token and drafted ones, as rows of one pass; `accept` keeps them
//
// Rows behind the length in the caches are nobody's: going back to an earlier token is counting fewer of them. A
// request may start from what an earlier one has computed of the same dialogue (`Computed`): rows whose tokens and
// pictures are the same, up to the first row of the last turn that the prober reads, which every prompt computes anew,
// and what the prober read of earlier turns.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "gate.hpp"
#include "image.hpp"
#include "manifest.hpp"
#include "speculate.hpp"
#include "subgraph.hpp"

namespace autosteer {

constexpr int64_t kPrefillChunk = 128;  // tokens: bounds activations; results do not depend on it

using Graphs = std::map<std::string, Subgraph>;
using Log = std::function<void(const std::string& line)>;

/// Wall time since it was made.
class Clock {
 public:
  double ms() const {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// What an answer cost. Milliseconds are wall time; `upper_ms` is absent where decoder_upper never ran.
struct Stats {
  std::string device = "CPUExecutionProvider";
  int64_t prompt_tokens = 0, completion_tokens = 0, image_tiles = 0, kv_bytes = 0;
  int64_t reused_tokens = 0;    ///< of the prompt's: already in the caches of the conversation
  int64_t drafted_tokens = 0;   ///< fed before they were sampled
  int64_t accepted_tokens = 0;  ///< of those: sampled, too
  double vision_ms = 0, embed_ms = 0, lower_ms = 0, gate_ms = 0;
  std::optional<double> upper_ms;
  double ttft_ms = 0;    ///< from the call to the first chunk
  double decode_ms = 0;  ///< passes after the first token

  /// Tokens per second after the first one; nothing for answers of one token.
  std::optional<double> decode_tok_s() const {
    const auto steps = static_cast<double>(completion_tokens - 1);
    return steps > 0 && decode_ms > 0 ? std::optional(1000 * steps / decode_ms) : std::nullopt;
  }
};

/// What a row stands for: nothing and a token id, or a picture's digest and a row of it.
using Key = std::pair<std::string, int64_t>;

/// A dialogue ready for the decoder.
struct Prompt {
  Rows inputs_embeds;                        // (S, D)
  std::vector<int64_t> token_ids;            // text tokens only: what the repetition penalty looks at
  std::vector<Key> keys;                     // S of them: equal keys behind equal keys are equal rows
  std::vector<std::vector<int64_t>> probed;  // by turn of the user's: rows whose mean the prober reads; none: too short
};

/// What the prober read of a turn (D,), by the first and last row it read.
using Means = std::map<std::pair<int64_t, int64_t>, std::vector<float>>;

/// What a request leaves behind for the next turn of its dialogue.
struct Computed {
  std::vector<Key> keys;  // of the rows that decoder_lower has seen
  Means means;
  KVCache lower, upper;
  std::vector<Tensor<float>> unseen;  // the last rows of decoder_lower's output, those that decoder_upper never saw
};

/// refusal_head and lm_head on fixed buffers: last (1, R, D), strength (1,) -> steered (1, R, D) -> logits (1, R, V).
inline std::vector<Call> steered_head(const Graphs& graphs, const Ort::Value& last, const Ort::Value& strength,
                                      const Ort::Value& steered, const Ort::Value& logits) {
  std::vector<Call> calls;
  calls.emplace_back(graphs.at("refusal_head"), Call::Bound{{"last_hidden_state", &last}, {"strength", &strength}},
                     Call::Bound{{"steered_hidden_state", &steered}});
  calls.emplace_back(graphs.at("lm_head"), Call::Bound{{"last_hidden_state", &steered}},
                     Call::Bound{{"logits", &logits}});
  return calls;
}

/// One answer in the making. One thread at a time; what it is given must outlive it.
class Request {
 public:
  const int64_t max_tokens;

  /// Buffers for `prompt` and an answer of `max_tokens`, which together fit the context.
  Request(const Manifest& manifest, const Graphs& graphs, const Log& log, Prompt prompt, int64_t max_tokens,
          Stats& stats, std::optional<Computed> computed)
      : max_tokens(max_tokens),
        manifest_(manifest),
        graphs_(graphs),
        log_(log),
        stats_(stats),
        embeds_(std::move(prompt.inputs_embeds)),
        keys_(std::move(prompt.keys)),
        probed_(std::move(prompt.probed)),
        prompt_length_(embeds_.count()),
        capacity_(prompt_length_ + max_tokens),
        reused_(computed ? resume(*computed) : 0),
        length_(reused_),
        lower_(reused_ ? std::move(computed->lower)
                       : KVCache(manifest.graphs.at("decoder_lower"), manifest, capacity_)),
        upper_(reused_ ? std::move(computed->upper)
                       : KVCache(manifest.graphs.at("decoder_upper"), manifest, capacity_)),
        logits_({1, 1 + Drafter::kMost, manifest.dims.vocab_size}),
        older_(unseen_.size()) {
    lower_.reserve(capacity_, reused_, manifest.dims.context_length);
    upper_.reserve(capacity_, reused_, manifest.dims.context_length);
    stats.reused_tokens = reused_;
    stats.kv_bytes = lower_.bytes + upper_.bytes;
  }

  /// Run decoder_lower over the prompt and decide. A prober that fails is an unsafe verdict, not an exception. So is a
  /// row that is not finite, whether the prober reads it or not: int8 caches make a number of NaN, and what later rows
  /// gather from it looks sound.
  Verdict judge(const GatePolicy& policy) {
    const Clock lower_clock;
    for (int64_t first = reused_; first < prompt_length_; first += kPrefillChunk) {
      const int64_t rows = std::min(kPrefillChunk, prompt_length_ - first);
      const Ort::Value embeds = Tensor<float>::view(embeds_.row(first), {1, rows, width()});
      Tensor<float> hidden({1, rows, width()});
      set_total(first + rows);
      lower(Use::reading, {"inputs_embeds", &embeds}, {"hidden_states", &hidden.value()})();
      finite_ = finite_ && std::all_of(hidden.data(), hidden.data() + hidden.size(), is_finite);
      unseen_.push_back(std::move(hidden));
      length_ = first + rows;
    }
    embeds_ = {};
    stats_.lower_ms = lower_clock.ms();
    const Clock gate_clock;
    for (const auto& read : probed_) {  // also where nobody asks for a score: the next turn may want one
      if (!read.empty() && means_.count(ends(read)) == 0) means_[ends(read)] = mean_of(read);
    }
    std::optional<double> p_unsafe;
    if (policy.mode != Mode::off) p_unsafe = probe();
    const Verdict verdict = decide(p_unsafe, policy, manifest_.split_layer);
    stats_.gate_ms = gate_clock.ms();
    return verdict;
  }

  /// Run decoder_upper over the prompt; logits (V,) of the first answer token, steered by `strength`.
  /// They are valid until the next pass.
  const float* begin(double strength) {
    const Clock clock;
    *strength_.data() = static_cast<float>(strength);
    Pass& single = pass(1);
    for (int64_t done = prompt_length_ - count(unseen_); !unseen_.empty(); unseen_.erase(unseen_.begin())) {
      const Tensor<float>& hidden = unseen_.front();
      done += hidden.shape()[1];
      set_total(done);
      const bool is_last = unseen_.size() == 1;  // the answer's passes need little of what a prompt's take
      upper(Use::reading, {"hidden_states", &hidden.value()}, single)(is_last ? shrinking() : Ort::RunOptions{nullptr});
    }
    stats_.upper_ms = clock.ms();
    for (Call& call : single.head) call();
    finite_ = finite_ && is_finite(*logits_.data());  // a row of NaN has no other logits
    return logits_.data();
  }

  /// Feed a token that was sampled and drafts (R in all): logits (R, V) of what follows each of them, valid until the
  /// next pass. Row i holds if tokens[1..i] come true: say so by `accept`, i times, or by feeding others over them.
  const float* verify(const std::vector<int64_t>& tokens) {
    const auto rows = static_cast<int64_t>(tokens.size());
    const int64_t room = std::min(capacity_ - length_, logits_.shape()[1]);
    if (rows > room) {
      throw std::logic_error("Request::verify: " + std::to_string(rows) + " tokens, and room for " +
                             std::to_string(room));
    }
    Pass& all = pass(rows);
    set_total(length_ + rows);
    std::copy(tokens.begin(), tokens.end(), all.token_ids.data());
    for (Call& call : all.body) call();
    for (Call& call : all.head) call();
    keys_.resize(static_cast<size_t>(length_));
    for (const int64_t token : tokens) keys_.emplace_back("", token);
    ++length_;
    for (int64_t row = 0; row < rows; ++row) {
      finite_ = finite_ && is_finite(logits_.data()[row * manifest_.dims.vocab_size]);
    }
    return logits_.data();
  }

  /// The next token of those that `verify` was given came true.
  void accept() { ++length_; }

  /// What the next turn of the dialogue can start from: nothing if rows are not finite. This request is over.
  Computed computed() {
    keys_.resize(finite_ ? static_cast<size_t>(length_) : 0);
    return {std::move(keys_), std::move(means_), std::move(lower_), std::move(upper_), std::move(unseen_)};
  }

 private:
  using Binding = std::pair<std::string, const Ort::Value*>;
  enum class Use { reading, answering };  // a prompt; tokens of an answer

  /// The whole decoder on R tokens, every buffer bound once.
  struct Pass {
    Pass(int64_t rows, const Dims& dims)
        : token_ids({1, rows}),
          num_logits({1}, {rows}),
          embeds({1, rows, dims.hidden_size}),
          hidden({1, rows, dims.hidden_size}),
          last({1, rows, dims.hidden_size}),
          steered({1, rows, dims.hidden_size}) {}

    Tensor<int64_t> token_ids, num_logits;
    Tensor<float> embeds, hidden, last, steered;
    std::vector<Call> body, head;  // token_ids -> last; last -> logits
  };

  /// The pass for `rows` tokens. `strength_` is set before the first.
  Pass& pass(int64_t rows) {
    const auto [found, is_new] = passes_.try_emplace(rows, rows, manifest_.dims);
    Pass& p = found->second;
    if (!is_new) return p;
    p.body.push_back(
        call("embed_tokens", {{"input_ids", &p.token_ids.value()}}, {{"inputs_embeds", &p.embeds.value()}}));
    p.body.push_back(lower(Use::answering, {"inputs_embeds", &p.embeds.value()}, {"hidden_states", &p.hidden.value()}));
    p.body.push_back(upper(Use::answering, {"hidden_states", &p.hidden.value()}, p));
    const Ort::Value logits = Tensor<float>::view(logits_.data(), {1, rows, manifest_.dims.vocab_size});
    if (*strength_.data() == 0.0F) {  // at strength 0 the Refusal Head changes nothing and is left out
      p.head.push_back(call("lm_head", {{"last_hidden_state", &p.last.value()}}, {{"logits", &logits}}));
    } else {
      p.head = steered_head(graphs_, p.last.value(), strength_.value(), p.steered.value(), logits);
    }
    return p;
  }

  /// How many rows of `computed` are this prompt's, too; takes what the prober read of them, and the rows that
  /// decoder_upper has yet to see.
  int64_t resume(Computed& computed) {
    const auto is_empty = [](const auto& rows) { return rows.empty(); };
    if (probed_.empty() || std::any_of(probed_.begin(), probed_.end(), is_empty)) return 0;
    const int64_t most = std::min(probed_.back().front(), static_cast<int64_t>(computed.keys.size()));
    int64_t reused = std::mismatch(keys_.begin(), keys_.begin() + most, computed.keys.begin()).first - keys_.begin();
    for (auto& [read, mean] : computed.means) {
      if (read.second < reused) means_[read] = std::move(mean);
    }
    for (const auto& read : probed_) {
      if (means_.count(ends(read)) == 0) reused = std::min(reused, read.front());
    }
    int64_t left = reused - (static_cast<int64_t>(computed.keys.size()) - count(computed.unseen));
    for (Tensor<float>& chunk : computed.unseen) {
      if (left <= 0) break;
      const int64_t rows = std::min(left, chunk.shape()[1]);
      left -= rows;
      if (rows == chunk.shape()[1]) {
        unseen_.push_back(std::move(chunk));
        continue;
      }
      unseen_.emplace_back(std::vector<int64_t>{1, rows, width()});
      std::copy(chunk.data(), chunk.data() + rows * width(), unseen_.back().data());
    }
    return reused;
  }

  /// What the prober says, and NaN where it says nothing: whatever went wrong, the prompt was not shown to be safe.
  double probe() const {
    std::string reason = "unknown";
    try {
      if (!finite_) throw PackageError(manifest_.reader("decoder_lower") + " gave rows that are not finite");
      const Subgraph& prober = graphs_.at("prober");
      if (probed_.empty()) throw PackageError("no turn is the user's");
      double p_unsafe = 0.0;
      for (const auto& rows : probed_) {
        if (rows.empty()) throw PackageError("the prompt has no row for the prober");
        const auto outputs = prober.run(Tensor<float>::view(means_.at(ends(rows)).data(), {1, width()}));
        p_unsafe = worse(p_unsafe, static_cast<double>(*floats(outputs.at(0), 1, prober)));
      }
      return p_unsafe;
    } catch (const std::exception& err) {
      reason = err.what();
    } catch (...) {
    }
    if (log_) log_("the prober failed; the prompt counts as unsafe (" + reason + ")");
    return std::nan("");
  }

  /// What the prober reads of a turn, (D,): HF's hidden_states[split_layer], the mean over `rows`.
  std::vector<float> mean_of(const std::vector<int64_t>& rows) const {
    std::vector<double> sum(static_cast<size_t>(width()), 0.0);
    for (const int64_t row : rows) {
      const int64_t at = row - reused_;
      const float* hidden =
          unseen_[older_ + static_cast<size_t>(at / kPrefillChunk)].data() + at % kPrefillChunk * width();
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += hidden[i];
    }
    std::vector<float> mean;
    for (const double value : sum) mean.push_back(static_cast<float>(value / static_cast<double>(rows.size())));
    return mean;
  }

  static std::pair<int64_t, int64_t> ends(const std::vector<int64_t>& rows) { return {rows.front(), rows.back()}; }

  /// Rows in all chunks.
  static int64_t count(const std::vector<Tensor<float>>& chunks) {
    int64_t rows = 0;
    for (const auto& chunk : chunks) rows += chunk.shape()[1];
    return rows;
  }

  static bool is_finite(float x) { return std::isfinite(x); }

  Call call(const std::string& graph, const Call::Bound& inputs, const Call::Bound& outputs) const {
    return {graphs_.at(graph), inputs, outputs};
  }

  Call lower(Use use, Binding in, Binding out) const {
    return half("decoder_lower", use, lower_, std::move(in), std::move(out));
  }

  /// As many of decoder_upper's rows as `pass` has, the last ones.
  Call upper(Use use, Binding in, const Pass& pass) const {
    return half("decoder_upper", use, upper_, std::move(in), {"last_hidden_state", &pass.last.value()},
                {{"num_logits", &pass.num_logits.value()}});
  }

  /// A decoder half on its caches.
  Call half(const char* name, Use use, const KVCache& cache, Binding in, Binding out,
            const Call::Bound& more = {}) const {
    Call::Bound inputs = cache.past, outputs = cache.present;
    inputs.insert(inputs.end(),
                  {std::move(in), {"seqlens_k", &seqlens_k_.value()}, {"total_sequence_length", &total_.value()}});
    inputs.insert(inputs.end(), more.begin(), more.end());
    outputs.push_back(std::move(out));
    return call(use == Use::reading ? manifest_.reader(name) : name, inputs, outputs);
  }

  /// How many rows the caches hold once the next graph has run.
  void set_total(int64_t total) {
    *seqlens_k_.data() = static_cast<int32_t>(total - 1);
    *total_.data() = static_cast<int32_t>(total);
  }

  int64_t width() const { return manifest_.dims.hidden_size; }

  const Manifest& manifest_;
  const Graphs& graphs_;
  const Log& log_;
  Stats& stats_;
  std::vector<Tensor<float>> unseen_;  // decoder_lower's output that decoder_upper has not seen, chunk by chunk
  Means means_;
  Rows embeds_;
  std::vector<Key> keys_;
  std::vector<std::vector<int64_t>> probed_;
  int64_t prompt_length_, capacity_;  // rows in the caches: of the prompt; that fit
  int64_t reused_, length_;           // that an earlier request left; that count
  KVCache lower_, upper_;
  Tensor<int32_t> seqlens_k_{{1}}, total_{{}};
  Tensor<float> strength_{{1}};
  Tensor<float> logits_;            // every pass's: the rows of a long draft are megabytes
  size_t older_;                    // chunks that an earlier request left; the prober reads none of them
  bool finite_ = true;              // what decoder_lower has made of the prompt, and what the passes behind it gave
  std::map<int64_t, Pass> passes_;  // by rows
};

}  // namespace autosteer
