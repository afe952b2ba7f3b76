// One answer being generated: its buffers, its KV caches, and how many of their positions are valid. The C++ side of
// runtime/generation.py.
//
//     prefill_lower   decoder_lower over the prompt; the prober; the gate's verdict
//     prefill_upper   decoder_upper over the prompt, then the head: logits of the first answer token
//     verify_draft    one pass over the last token and drafted ones; `accept_draft` keeps a drafted token
//
// If the package has prefill graphs, prefill_lower and prefill_upper run them: the same layers on the same caches, with
// weights at another precision.
//
// Cache positions past the length are invalid, so returning to an earlier token only lowers the length.
//
// A request may start from the cached prefix of an earlier one (CachedPrefix). It reuses the positions whose tokens and
// pictures are equal, but stops before the first position that the prober reads of the last turn: those are always
// computed. It also reuses what the prober read of earlier turns.
#pragma once

#include <algorithm>
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

#include "deepstack.hpp"
#include "drafting.hpp"
#include "encoded_prompt.hpp"
#include "errors.hpp"
#include "gate.hpp"
#include "image.hpp"
#include "kv_cache.hpp"
#include "log.hpp"
#include "manifest.hpp"
#include "rotary.hpp"
#include "stats.hpp"
#include "subgraph.hpp"

namespace autosteer {

constexpr int64_t kPrefillChunk = 128;  // tokens: bounds activations; results do not depend on it

using Graphs = std::map<std::string, Subgraph>;

/// What the prober read of a turn (D,), by the first and last position.
using ProbedMeans = std::map<std::pair<int64_t, int64_t>, std::vector<float>>;

/// What a request leaves for the next turn of its dialogue.
struct CachedPrefix {
  bool is_long;  // RotarySpec::is_long of its prompt: how its keys are turned
  std::vector<Key> keys;  // of the positions that decoder_lower has run over
  ProbedMeans probed_means;
  KVCache lower, upper;
  /// Hidden states (1, n, D) of the last positions, if decoder_upper has not run over them: after a STOP.
  std::vector<Tensor<float>> pending;
  bool lent = false;  // the caches are still another request's: only read, and only those of decoder_lower
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

/// p_unsafe that the prober, or a monitor, gives a mean hidden state (D,); NaN if it fails: whatever went wrong, what
/// it reads was not shown to be safe. `failure`: what is logged then.
inline double probe(const Subgraph& prober, const Log& log, const std::vector<float>& mean,
                    const char* failure = "the prober failed; the prompt counts as unsafe") {
  std::string reason = "unknown";
  try {
    const auto outputs = prober.run(Tensor<float>::view(mean.data(), {1, static_cast<int64_t>(mean.size())}));
    return static_cast<double>(*floats(outputs.at("p_unsafe"), 1, prober));
  } catch (const std::exception& err) {
    reason = err.what();
  } catch (...) {
  }
  if (log && !Cancellation::is_cancelled()) log(failure + (" (" + reason + ")"));
  return std::nan("");
}

/// The mean (D,) of rows of `width` numbers. Sums in double, so the order changes nothing but rounding.
inline std::vector<float> mean_of_rows(const std::vector<const float*>& rows, int64_t width) {
  std::vector<double> sum(static_cast<size_t>(width), 0.0);
  for (const float* row : rows) {
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += row[i];
  }
  std::vector<float> mean;
  for (const double value : sum) mean.push_back(static_cast<float>(value / static_cast<double>(rows.size())));
  return mean;
}

/// One answer being generated. Not thread-safe; `manifest`, `graphs`, `log` and `stats` must outlive it. Call
/// prefill_lower, then prefill_upper, then verify_draft for each further pass.
class Request {
 public:
  const int64_t max_tokens;
  std::vector<double> scores;  ///< p_unsafe by judged turn, once the prober has read it

  /// Allocate for `prompt` and an answer of `max_tokens`, which together must fit the context.
  Request(const Manifest& manifest, const Graphs& graphs, const Log& log, EncodedPrompt prompt, int64_t max_tokens,
          Stats& stats, std::optional<CachedPrefix> cached)
      : max_tokens(max_tokens),
        scores(prompt.probed.size(), std::nan("")),
        manifest_(manifest),
        graphs_(graphs),
        log_(log),
        stats_(stats),
        embeds_(std::move(prompt.inputs_embeds)),
        keys_(std::move(prompt.keys)),
        probed_(std::move(prompt.probed)),
        prompt_length_(embeds_.count()),
        capacity_(prompt_length_ + max_tokens),
        reused_(cached ? reuse_prefix(*cached) : 0),
        length_(reused_),
        lower_(!reused_       ? KVCache(manifest.graphs.at("decoder_lower"), manifest, capacity_)
               : cached->lent ? cached->lower.copy(reused_, with_slack(capacity_))
                              : std::move(cached->lower)),
        upper_(!reused_ || cached->lent ? KVCache(manifest.graphs.at("decoder_upper"), manifest, capacity_)
                                        : std::move(cached->upper)),
        deepstack_(manifest.deepstack(), manifest.dims.hidden_size, std::move(prompt.pictures)),
        rotary_(manifest.rotary, std::move(prompt.positions), capacity_, reused_ - count(pending_)),
        logits_({1, 1 + Drafter::kMaxDraft, manifest.dims.vocab_size}),
        cached_chunks_(pending_.size()) {
    lower_.reserve(capacity_, reused_, manifest.dims.context_length);
    upper_.reserve(capacity_, reused_, manifest.dims.context_length);
    stats.reused_tokens = reused_;
    stats.kv_bytes = lower_.bytes + upper_.bytes;
  }

  /// Run decoder_lower over the prompt, then the prober, and apply `policy`. If the prober fails, the verdict is
  /// unsafe; nothing is thrown. The verdict is also unsafe if any hidden state is not finite, whether the prober reads
  /// it or not: int8 caches turn NaN into a number, and later positions that attend to it look sound.
  Verdict prefill_lower(const GatePolicy& policy) {
    const Clock lower_clock;
    for (int64_t first = reused_; first < prompt_length_; first += kPrefillChunk) {
      const int64_t n = std::min(kPrefillChunk, prompt_length_ - first);
      const Ort::Value embeds = Tensor<float>::view(embeds_.row(first), {1, n, width()});
      Tensor<float> hidden({1, n, width()});
      set_total(first + n);
      Call half = lower(first, n, {"inputs_embeds", &embeds}, {"hidden_states", &hidden.value()});
      hide_nothing(half, n);
      half();
      finite_ = finite_ && std::all_of(hidden.data(), hidden.data() + hidden.size(), is_finite);
      pending_.push_back(std::move(hidden));
      length_ = first + n;
    }
    embeds_ = {};
    stats_.lower_ms = lower_clock.ms();
    const Clock gate_clock;
    for (const auto& read : probed_) {  // with Mode::off, too: the conversation's next turn may need them
      if (!read.empty() && probed_means_.count(ends(read)) == 0) probed_means_[ends(read)] = mean_of(read);
    }
    std::optional<double> p_unsafe;
    if (policy.mode != Mode::off) p_unsafe = probe_turns();
    const Verdict verdict = decide(p_unsafe, policy, manifest_.split_layer);
    stats_.gate_ms = gate_clock.ms();
    return verdict;
  }

  /// Run decoder_upper over the prompt; logits (V,) of the first answer token, steered by `strength`. Valid until the
  /// next pass.
  const float* prefill_upper(double strength) {
    const Clock clock;
    *strength_.data() = static_cast<float>(strength);
    const bool finite = std::exchange(finite_, false);  // until the first logits are known to be
    DecoderPass& single = pass(1);
    for (int64_t done = prompt_length_ - count(pending_); !pending_.empty(); pending_.erase(pending_.begin())) {
      const Tensor<float>& hidden = pending_.front();
      const int64_t n = hidden.shape()[1];
      done += n;
      set_total(done);
      const bool is_last = pending_.size() == 1;  // decoding needs little of the memory that prefill takes
      Call half = upper(done - n, n, {"hidden_states", &hidden.value()}, single);
      half(is_last ? Cancellation::shrinking() : Cancellation::plain());
    }
    stats_.upper_ms = clock.ms();
    for (Call& call : single.head) call();
    finite_ = finite && is_finite(*logits_.data());  // NaN makes all of its row NaN
    return logits_.data();
  }

  /// Run the decoder on a sampled token and the draft after it (R tokens in all); logits (R, V) of what follows each of
  /// them, valid until the next pass. Row i holds only if the sampler chooses tokens[1..i]. Call `accept_draft` for
  /// each one that it does choose; the next pass overwrites the others.
  const float* verify_draft(const std::vector<int64_t>& tokens) {
    const auto count = static_cast<int64_t>(tokens.size());
    const int64_t room = std::min(capacity_ - length_, logits_.shape()[1]);
    if (count > room) {
      throw std::logic_error("Request::verify_draft: " + std::to_string(count) + " tokens, and room for " +
                             std::to_string(room));
    }
    DecoderPass& all = pass(count);
    set_total(length_ + count);
    std::copy(tokens.begin(), tokens.end(), all.token_ids.data());
    hide_nothing(all.body[1], count);
    for (Call& call : all.body) call();
    for (Call& call : all.head) call();
    hidden_ = all.hidden.data();
    keys_.resize(static_cast<size_t>(length_));
    for (const int64_t token : tokens) keys_.emplace_back("", token);
    ++length_;
    for (int64_t row = 0; row < count; ++row) {
      finite_ = finite_ && is_finite(logits_.data()[row * manifest_.dims.vocab_size]);
    }
    return logits_.data();
  }

  /// What decoder_lower made of a token of the latest `verify_draft`: (D,), HF's hidden_states[split_layer].
  const float* hidden_state(size_t row) const { return hidden_ + row * static_cast<size_t>(width()); }

  /// Keep the next drafted token of the latest `verify_draft`: the sampler chose it.
  void accept_draft() { ++length_; }

  /// What the next turn of the dialogue can start from; empty if anything was not finite. Ends this request.
  CachedPrefix cached_prefix() {
    if (!finite_) pending_.clear();
    keys_.resize(finite_ ? static_cast<size_t>(length_) : 0);
    const bool is_long = manifest_.rotary.is_long(prompt_length_);
    return {is_long,           std::move(keys_),  std::move(probed_means_),
            std::move(lower_), std::move(upper_), std::move(pending_)};
  }

  /// What a reading of the same dialogue (judge.hpp) can start from: a request that never runs decoder_upper. It copies
  /// what it needs of this one's caches. Empty if anything was not finite.
  CachedPrefix lend_prefix() const {
    const int64_t length = finite_ ? std::min(length_, prompt_length_) : 0;
    const std::vector<Key> keys(keys_.begin(), keys_.begin() + length);
    return {manifest_.rotary.is_long(prompt_length_), keys, probed_means_, lower_, upper_, {}, true};
  }

 private:
  using Binding = std::pair<std::string, const Ort::Value*>;

  /// The whole decoder on R tokens, with every buffer bound once.
  struct DecoderPass {
    DecoderPass(int64_t count, const Dims& dims)
        : token_ids({1, count}),
          num_logits({1}, {count}),
          embeds({1, count, dims.hidden_size}),
          hidden({1, count, dims.hidden_size}),
          last({1, count, dims.hidden_size}),
          steered({1, count, dims.hidden_size}) {}

    Tensor<int64_t> token_ids, num_logits;
    Tensor<float> embeds, hidden, last, steered;
    std::vector<Call> body, head;  // token_ids -> last: embed_tokens, both halves; last -> logits
  };

  /// The pass for `count` tokens, bound on first use. `strength_` must have been set.
  DecoderPass& pass(int64_t count) {
    const auto [found, is_new] = passes_.try_emplace(count, count, manifest_.dims);
    DecoderPass& p = found->second;
    if (!is_new) return p;
    p.body.push_back(
        call("embed_tokens", {{"input_ids", &p.token_ids.value()}}, {{"inputs_embeds", &p.embeds.value()}}));
    const int64_t first = prompt_length_;  // or any behind the prompt
    p.body.push_back(lower(first, count, {"inputs_embeds", &p.embeds.value()}, {"hidden_states", &p.hidden.value()}));
    p.body.push_back(upper(first, count, {"hidden_states", &p.hidden.value()}, p));
    const Ort::Value logits = Tensor<float>::view(logits_.data(), {1, count, manifest_.dims.vocab_size});
    if (*strength_.data() == 0.0F) {  // at strength 0 the Refusal Head changes nothing and is skipped
      p.head.push_back(call("lm_head", {{"last_hidden_state", &p.last.value()}}, {{"logits", &logits}}));
    } else {
      p.head = steered_head(graphs_, p.last.value(), strength_.value(), p.steered.value(), logits);
    }
    return p;
  }

  /// Room for a reading, and for the next, which may be a little longer.
  int64_t with_slack(int64_t capacity) const {
    return std::min(capacity + kPrefillChunk, manifest_.dims.context_length);
  }

  /// How many positions of `cached` this prompt can reuse. Moves their probed means and pending hidden states here.
  int64_t reuse_prefix(CachedPrefix& cached) {
    if (cached.is_long != manifest_.rotary.is_long(prompt_length_) || !is_probed(probed_)) return 0;
    const int64_t most = std::min(probed_.back().front(), static_cast<int64_t>(cached.keys.size()));
    int64_t reused = std::mismatch(keys_.begin(), keys_.begin() + most, cached.keys.begin()).first - keys_.begin();
    for (auto& [read, mean] : cached.probed_means) {
      if (read.second < reused) probed_means_[read] = std::move(mean);
    }
    for (const auto& read : probed_) {
      if (probed_means_.count(ends(read)) == 0) reused = std::min(reused, read.front());
    }
    int64_t left = reused - (static_cast<int64_t>(cached.keys.size()) - count(cached.pending));
    for (Tensor<float>& chunk : cached.pending) {
      if (left <= 0) break;
      const int64_t n = std::min(left, chunk.shape()[1]);
      left -= n;
      if (n == chunk.shape()[1]) {
        pending_.push_back(std::move(chunk));
        continue;
      }
      pending_.emplace_back(std::vector<int64_t>{1, n, width()});
      std::copy(chunk.data(), chunk.data() + n * width(), pending_.back().data());
    }
    return reused;
  }

  /// The worst p_unsafe of all judged turns; NaN if there is none.
  double probe_turns() {
    if (!finite_ || !is_probed(probed_)) {
      const std::string what = finite_ ? "a turn has no position for the prober"
                                       : manifest_.prefill_graph("decoder_lower") +
                                             " gave hidden states that are not finite";
      if (log_) log_(what + ", so the prompt counts as unsafe");
      return std::nan("");
    }
    double p_unsafe = 0.0;
    for (size_t turn = 0; turn < probed_.size(); ++turn) {
      scores[turn] = probe(graphs_.at("prober"), log_, probed_means_.at(ends(probed_[turn])));
      p_unsafe = worse(p_unsafe, scores[turn]);
    }
    return p_unsafe;
  }

  /// The attention bias of a pass over `rows` positions, if decoder_lower has one: nothing is hidden (packed.hpp).
  void hide_nothing(Call& lower, int64_t rows) {
    if (!manifest_.reads_in_packs()) return;
    nothing_hidden_.emplace(std::vector<int64_t>{1, 1, rows, *total_.data()});
    lower.bind(kAttentionBias, nothing_hidden_->value());
  }

  /// What the prober reads of a turn, (D,): the mean of HF's hidden_states[split_layer] over `positions`.
  std::vector<float> mean_of(const std::vector<int64_t>& positions) const {
    std::vector<const float*> rows;
    for (const int64_t position : positions) {
      const int64_t at = position - reused_;
      const Tensor<float>& chunk = pending_[cached_chunks_ + static_cast<size_t>(at / kPrefillChunk)];
      rows.push_back(chunk.data() + at % kPrefillChunk * width());
    }
    return mean_of_rows(rows, width());
  }

  static std::pair<int64_t, int64_t> ends(const std::vector<int64_t>& positions) {
    return {positions.front(), positions.back()};
  }

  /// Positions in all chunks.
  static int64_t count(const std::vector<Tensor<float>>& chunks) {
    int64_t positions = 0;
    for (const auto& chunk : chunks) positions += chunk.shape()[1];
    return positions;
  }

  static bool is_finite(float x) { return std::isfinite(x); }

  Call call(const std::string& graph, const Call::Bound& inputs, const Call::Bound& outputs) const {
    return {graphs_.at(graph), inputs, outputs};
  }

  Call lower(int64_t first, int64_t count, Binding in, Binding out) {
    return half("decoder_lower", first, count, lower_, std::move(in), std::move(out));
  }

  /// decoder_upper; it keeps the last positions, as many as `pass` has.
  Call upper(int64_t first, int64_t count, Binding in, const DecoderPass& pass) {
    return half("decoder_upper", first, count, upper_, std::move(in), {"last_hidden_state", &pass.last.value()},
                {{"num_logits", &pass.num_logits.value()}});
  }

  /// A decoder half bound to its caches, for a pass over `count` positions from `first` on: those of the prompt by its
  /// prefill graph, if the package has one.
  Call half(const char* name, int64_t first, int64_t count, const KVCache& cache, Binding in, Binding out,
            const Call::Bound& more = {}) {
    Call::Bound inputs = cache.past, outputs = cache.present;
    const auto rotary = rotary_.inputs();
    inputs.insert(inputs.end(), {std::move(in),
                                 {"seqlens_k", &seqlens_k_.value()},
                                 {"total_sequence_length", &total_.value()}});
    inputs.insert(inputs.end(), rotary.begin(), rotary.end());
    inputs.insert(inputs.end(), more.begin(), more.end());
    const auto added = deepstack_.inputs(manifest_.graphs.at(name).layers.value(), first, count);
    inputs.insert(inputs.end(), added.begin(), added.end());
    outputs.push_back(std::move(out));
    return call(first < prompt_length_ ? manifest_.prefill_graph(name) : name, inputs, outputs);
  }

  /// Set how many positions the caches hold once the next graph has run.
  void set_total(int64_t total) {
    rotary_.extend(total);
    *seqlens_k_.data() = static_cast<int32_t>(total - 1);
    *total_.data() = static_cast<int32_t>(total);
  }

  int64_t width() const { return manifest_.dims.hidden_size; }

  const Manifest& manifest_;
  const Graphs& graphs_;
  const Log& log_;
  Stats& stats_;
  std::vector<Tensor<float>> pending_;  // hidden states that decoder_upper has not run over, chunk by chunk
  ProbedMeans probed_means_;
  Rows embeds_;
  std::vector<Key> keys_;
  Probed probed_;
  int64_t prompt_length_, capacity_;  // positions: of the prompt; that the caches have room for
  int64_t reused_, length_;           // positions: taken from the cached prefix; valid in the caches
  KVCache lower_, upper_;
  Deepstack deepstack_;
  RotaryTables rotary_;
  Tensor<int32_t> seqlens_k_{{1}}, total_{{}};
  std::optional<Tensor<float>> nothing_hidden_;  // the latest attention bias
  Tensor<float> strength_{{1}};
  Tensor<float> logits_;                   // shared by all passes: logits of a draft take megabytes
  const float* hidden_ = nullptr;          // (R, D) of the latest pass
  size_t cached_chunks_;                   // pending chunks of an earlier request; the prober reads none of them
  bool finite_ = true;                     // hidden states of the prompt, and logits of every pass
  std::map<int64_t, DecoderPass> passes_;  // by number of tokens
};

}  // namespace autosteer
