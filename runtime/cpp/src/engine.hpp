// Load a package and answer prompts: THE loop, with the gate inside it. The C++ side of runtime/engine.py, name by
// name.
//
//     images -> vision_encoder -> rows ---+     or, where images are tokens: image_tokenizer -> ids -> embed_tokens
//     text   -> token ids -> embed_tokens +-> decoder_lower -> prober -> decide
//                                                                  STOP:  the refusal text, and nothing more runs
//                                                                  STEER: strength > 0     PASS: strength = 0
//            -> decoder_upper -> (refusal_head) -> lm_head -> sample -> (held back) -> text
//                  ^                                             |          ^
//                  +---- decoder_lower <- embed_tokens <---------+          |
//                                   +------> (monitor): unsafe ends the answer
//
// Prefill is layer-major: decoder_lower runs over the whole prompt, the prober reads its output, and only then does
// decoder_upper run. The gate changes the head and never the caches, so this computes the same as running layer by
// layer. A stopped prompt costs k/N of prefill and no decoding.
//
// If an answer copies from its prompt, or says what the model often says, the decoder verifies several tokens per pass
// (drafting.hpp).
//
// All state belongs to a Request (generation.hpp) or to the Conversation that you pass. One Engine may serve several
// threads; a Stream and a Conversation belong to one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "audit.hpp"
#include "chunk.hpp"
#include "conversation.hpp"
#include "draft_table.hpp"
#include "drafting.hpp"
#include "encoded_prompt.hpp"
#include "errors.hpp"
#include "gate.hpp"
#include "generation.hpp"
#include "held_back.hpp"
#include "image.hpp"
#include "judge.hpp"
#include "manifest.hpp"
#include "monitor.hpp"
#include "pages.hpp"
#include "prompt_encoder.hpp"
#include "sampling.hpp"
#include "self_test.hpp"
#include "stats.hpp"
#include "subgraph.hpp"
#include "text.hpp"
#include "tokenizer.hpp"

namespace autosteer {

constexpr const char* kUnguarded =
    "this package was exported with --unguarded: it has no prober and no refusal head; run it with --policy off, or "
    "export it again with --safety";

/// How to load a package.
struct EngineOptions {
  std::string device = "auto";            ///< auto or cpu
  int64_t threads = 0;                    ///< 0: every CPU this process may use
  std::optional<int64_t> max_tiles = {};  ///< cut a picture into at most this many tiles
  bool low_memory = false;                ///< check and load the image graph for each picture, then drop it
  bool files = true;                      ///< whether messages may name files of pictures
  std::optional<Mode> policy = {};        ///< of every request in JSON, which may then say nothing of the gate
  std::optional<bool> judge_answers = {};  ///< of requests in JSON that do not say it; nothing: as the package says
  bool advise_pages = false;              ///< advise Linux on the process's memory while loading (pages.hpp)
  std::string onnxruntime = {};           ///< path of libonnxruntime.so; "": find_onnxruntime() says where it is
  std::string audit = {};                 ///< file to append a line to for each request; "": none
  bool audit_texts = false;               ///< with the words of prompts and answers, not only their digests
  Log log = {};                           ///< receives the reason if a prober fails; never prompts
};

class Stream;

/// A loaded package.
class Engine {
  std::unique_ptr<Pages> pages_;  // first member: it sees what the others load; null: not asked for

 public:
  /// Check every file of `folder` against the manifest's hashes and load it.
  /// Throws PackageError (package damaged or incomplete, another version, a gate that does not work here),
  /// ProviderError (device not available, onnxruntime too old), InputError (no such folder for EngineOptions::audit) or
  /// OptionError (more than four threads for each CPU).
  explicit Engine(const fs::path& folder, const EngineOptions& options = {})
      : pages_(options.advise_pages ? std::make_unique<Pages>() : nullptr),
        manifest(Manifest::load(folder)),
        log(options.log),
        only_policy(options.policy),
        judge_answers(options.judge_answers),
        audit_(options.audit.empty() ? nullptr
                                     : std::make_unique<Audit>(options.audit, sha256(folder / kManifestFile),
                                                               options.audit_texts)),
        tokenizer(checked(folder, options.onnxruntime)),
        encoder(manifest, tokenizer, options.max_tiles, [this](const auto& name) { return graph(name); }),
        judge(
            encoder,
            [this](EncodedPrompt prompt, Stats& stats, Conversation& before) {
              return request(std::move(prompt), 1, stats, &before);
            },
            manifest.reads_in_packs() ? Judge::ReadPacked([this](auto& begun, const auto& prompts) {
              return read_packed(manifest, graphs_, log, begun, prompts);
            })
                                      : Judge::ReadPacked(),
            manifest.split_layer, log),
        folder_(fs::absolute(folder)),
        files_(options.files) {
    if (options.device != "auto" && options.device != "cpu") {
      throw ProviderError("--device " + options.device + ": the C++ runtime binds CPU buffers only; use --device cpu");
    }
    environment_.emplace(threads_for(options.threads));
    const auto load = [&](const std::string& name, const GraphSpec& spec) {
      if (options.low_memory && image_graphs().count(name)) return;
      graphs_.try_emplace(name, *environment_, folder / spec.file, spec);
      if (spec.layers && pages_) pages_->give_back();  // before the next large graph loads
    };
    // First the graphs whose loading peaks highest, while nothing else is in memory.
    for (const char* name : {"vision_encoder", "image_tokenizer", "lm_head"}) {
      if (const auto found = manifest.graphs.find(name); found != manifest.graphs.end()) load(name, found->second);
    }
    for (const auto& [name, spec] : manifest.graphs) load(name, spec);
    if (manifest.drafts) {
      drafts_.emplace(folder / manifest.drafts->file, static_cast<size_t>(manifest.drafts->ngrams),
                      manifest.dims.vocab_size);
    }
    check_gate(folder, manifest, graphs_);
    check_packs(manifest, graphs_);
    if (pages_) pages_->place();
  }
  Engine(const Engine&) = delete;  // the encoder points into it
  Engine& operator=(const Engine&) = delete;

  /// The package's policy with your overrides. Without `pieces` answers are judged only if you say so. Throws
  /// PackageError if `mode` needs a gate and the package has none, InputError for numbers out of range.
  GatePolicy policy(Mode mode = Mode::steer, std::optional<double> threshold = {},
                    std::optional<double> strength = {}, bool pieces = true,
                    std::optional<bool> judge_answers = {}) const {
    if (!manifest.prober || !manifest.refusal) {
      if (mode != Mode::off) {
        throw PackageError(kUnguarded);
      }
      return {mode, 0.0, 0.0, ""};
    }
    GatePolicy policy{mode, threshold.value_or(manifest.prober->threshold),
                      strength.value_or(manifest.refusal->strength), manifest.refusal->text};
    policy.pieces = pieces;
    policy.judge_answers = judge_answers.value_or(pieces && manifest.prober->judge_answers);
    policy.judge_threshold = manifest.prober->judge_threshold.value_or(1.0);
    policy.check();
    return policy;
  }

  /// Answer a dialogue in chunks; each carries the verdict. With a `conversation` only what is new in the dialogue is
  /// computed. Nothing runs before the first `next()`. The engine and the conversation must outlive the stream. Throws
  /// InputError if the conversation belongs to another engine.
  Stream stream(std::vector<Message> messages, const SamplingConfig& sampling, const GatePolicy& policy,
                Conversation* conversation = nullptr) const;

  /// The whole answer at once. `on_chunk`, if given, is called with every chunk.
  Answer generate(std::vector<Message> messages, const SamplingConfig& sampling, const GatePolicy& policy,
                  const std::function<void(const Chunk&)>& on_chunk = {}, Conversation* conversation = nullptr) const;

  /// The verdict on a dialogue, without an answer: decoder_upper never runs. There is no answer to judge, so the prompt
  /// is read as under a policy with `judge_answers` false (readings.hpp, with_each_picture). Throws InputError if the
  /// prompt, an image or a video is unusable, or does not fit the context.
  Verdict score(const std::vector<Message>& messages, GatePolicy policy) const {
    policy.judge_answers = false;
    check_files(messages);
    policy.check();
    Stats stats;
    Record record = this->record(policy, messages, stats);
    record.begin();
    try {
      Conversation own;
      EncodedPrompt prompt = encode(messages, stats, &own);
      record.seen = prompt.seen;
      Request asked = request(std::move(prompt), 1, stats);
      const Verdict verdict = judge.prompt(asked, record, policy, &own);
      record.gave("", "scored");
      return verdict;
    } catch (...) {
      record.failed(std::current_exception());
      throw;
    }
  }

  /// `generate` for what `encode` returns. The prober reads its turns where they stand, and no piece of them.
  Answer generate_encoded(const std::function<EncodedPrompt(Stats&)>& encode, const SamplingConfig& sampling,
                          const GatePolicy& policy) const;

  /// A request's dialogue as the decoder's input. Throws InputError as `score` does.
  EncodedPrompt encode(const std::vector<Message>& messages, Stats& stats, Conversation* conversation = nullptr) const {
    check_turns(messages);
    return encoder.prepare(messages, stats, conversation);
  }

  /// Throws InputError for a picture that is the name of a file, where EngineOptions::files forbids them.
  void check_files(const std::vector<Message>& messages) const {
    if (!files_ && std::any_of(messages.begin(), messages.end(), names_a_file)) {
      throw InputError("a picture is the name of a file, which this engine does not open");
    }
  }

  /// Tokens of the prompt that these messages become, those of pictures and videos included. The decoder does not run.
  int64_t count_tokens(const std::vector<Message>& messages) const {
    check_files(messages);
    Stats stats;
    return encode(messages, stats).inputs_embeds.count();
  }

  /// Buffers and caches for one answer. Throws InputError if the prompt does not fit the context.
  Request request(EncodedPrompt prompt, int64_t max_tokens, Stats& stats, Conversation* conversation = nullptr) const {
    const int64_t length = prompt.inputs_embeds.count(), context = manifest.dims.context_length;
    check_length(manifest, length);
    return {manifest,
            graphs_,
            log,
            std::move(prompt),
            std::min(max_tokens, manifest.rotary.longest_answer(length, context)),
            stats,
            conversation ? conversation->take_prefix() : std::nullopt};
  }

  /// Where a request notes what becomes of it. What it is given must outlive it. Throws PackageError for a package
  /// without a gate unless `policy` is off.
  Record record(const GatePolicy& policy, const std::vector<Message>& messages, Stats& stats) const {
    if (policy.mode != Mode::off && !manifest.guarded) throw PackageError(kUnguarded);
    return {audit_.get(), policy, messages, stats};
  }

  const Manifest manifest;
  const Log log;
  const std::optional<Mode> only_policy;  ///< EngineOptions::policy
  const std::optional<bool> judge_answers;  ///< EngineOptions::judge_answers

  const Graphs& graphs() const { return graphs_; }

  /// The package's table of n-grams; null if it has none.
  const DraftTable* drafts() const { return drafts_ ? &*drafts_ : nullptr; }

 private:
  const std::unique_ptr<Audit> audit_;  // opened before the package's files are read

 public:
  const Tokenizer tokenizer;
  const PromptEncoder encoder;
  const Judge judge;

 private:
  /// A graph by name. If low_memory left it out, the package is verified and the graph loaded for this call.
  std::shared_ptr<const Subgraph> graph(const std::string& name) const {
    if (graphs_.count(name)) return {std::shared_ptr<void>(), &graphs_.at(name)};  // owned by graphs_
    manifest.verify(folder_);
    const GraphSpec& spec = manifest.graphs.at(name);
    return std::make_shared<const Subgraph>(*environment_, folder_ / spec.file, spec);
  }

  /// Check every file of the package; the tokenizer's path.
  fs::path checked(const fs::path& folder, const std::string& onnxruntime) const {
    find_onnxruntime(onnxruntime);
    require_onnxruntime(manifest.onnxruntime);
    manifest.verify(folder);
    return folder / manifest.prompt.tokenizer;
  }

  const fs::path folder_;
  const bool files_;
  std::optional<Environment> environment_;
  Graphs graphs_;
  std::optional<DraftTable> drafts_;
};

/// An answer in chunks: call `next` until it returns nothing.
class Stream {
 public:
  /// Encodes the prompt, when the first chunk is requested.
  using Prepare = std::function<EncodedPrompt(const std::vector<Message>&, Stats&, Conversation*)>;

  Stream(const Engine& engine, std::vector<Message> messages, Prepare prepare, const SamplingConfig& sampling,
         GatePolicy policy, Conversation* conversation)
      : engine_(engine),
        conversation_(conversation ? conversation : &own_),
        messages_(std::move(messages)),
        prepare_(std::move(prepare)),
        policy_(std::move(policy)),
        sampling_(sampling),
        sample_(sampling),
        detokeniser_(engine.tokenizer, sampling.stop),
        record_(engine.record(policy_, messages_, stats_)) {
    if (conversation && !conversation->belongs_to(engine)) {
      throw InputError("this conversation was begun with another engine");
    }
    sampling.check();
    policy_.check();
    for (const std::string& stop : sampling.stop) {
      if (!unicode::is_valid(stop)) throw InputError("a stop string is not valid Unicode text");
    }
    if (engine.manifest.monitor && policy_.mode != Mode::off) {
      monitor_.emplace(engine.manifest, engine.graphs(), engine.log, policy_, stats_);
      next_ = UntilWatched(std::move(next_), *monitor_, policy_);
    }
    const bool all_answers = policy_.judge_answers || sampling.answer_is_judged();
    if (policy_.mode != Mode::off) {
      const auto said = [this] {
        Detokeniser whole(engine_.tokenizer, {});
        std::string text;
        for (size_t i = prompt_tokens_; i < tokens_.size(); ++i) text += whole.push(tokens_[i]);
        return text;
      };
      const auto score = [this](const std::string& answer) {
        return engine_.judge.answer(answer, *request_, record_);
      };
      next_ = UntilJudged(std::move(next_), said, score, policy_, all_answers);
    }
  }

  ~Stream() {
    try {
      leave();
    } catch (...) {  // no memory to keep the prefix: the conversation's next request computes all
    }
    try {
      record_.failed(nullptr);
    } catch (...) {  // the engine's next request is refused
    }
  }
  Stream(const Stream&) = delete;  // the request points into it
  Stream& operator=(const Stream&) = delete;

  /// The next chunk. Throws InputError if the prompt, an image or a video is unusable, or does not fit the context;
  /// AuditError if the engine has an audit record that cannot be written. After an exception the stream has ended.
  std::optional<Chunk> next() {
    if (ended_) return std::nullopt;
    ended_ = true;  // also if this call throws
    if (!request_) clock_ = Clock();
    record_.begin();
    try {
      while (ready_.empty()) compute_next();
      Chunk chunk = std::move(ready_.front());
      ready_.pop_front();
      ended_ = !chunk.finish_reason.empty();
      return chunk;
    } catch (...) {
      record_.failed(std::current_exception());
      throw;
    }
  }

  /// All chunks as one answer. `on_chunk`, if given, is called with each.
  Answer whole(const std::function<void(const Chunk&)>& on_chunk = {}) {
    Answer answer;
    while (const std::optional<Chunk> chunk = next()) {
      answer.add(*chunk);
      if (on_chunk) on_chunk(*chunk);
    }
    return answer;
  }

  /// End the answer: a `next` that is running throws Cancelled soon, and so does the next one. For any thread.
  void cancel() { cancellation_.cancel(); }

 private:
  /// End the answer, and give the cached prefix back to the conversation.
  void leave() {
    if (request_ && conversation_ != &own_) conversation_->keep_prefix(request_->cached_prefix());
    request_.reset();
  }

  Chunk begin_answer() {
    EncodedPrompt prompt = prepare_(messages_, stats_, conversation_);
    tokens_ = prompt.token_ids;
    record_.seen = prompt.seen;
    request_.emplace(engine_.request(std::move(prompt), sampling_.max_tokens, stats_, conversation_));
    prompt_tokens_ = tokens_.size();
    const GatePolicy policy = sampling_.restricts() ? without_steering(policy_) : policy_;
    verdict_ = engine_.judge.prompt(*request_, record_, policy, conversation_);
    if (verdict_.action == Action::stop) {
      return {policy_.refusal_text, std::nullopt, verdict_, "refused", std::nullopt};
    }
    if (verdict_.action == Action::steer) sample_ = Sampler(sampling_.greedy());
    if (sampling_.speculate) {
      drafter_.emplace(tokens_, position_costs().at(engine_.manifest.graphs.at("decoder_lower").precision),
                       engine_.drafts());
    }
    logits_ = request_->prefill_upper(verdict_.strength);
    return choose();
  }

  Chunk continue_answer() {
    const Clock clock;
    const int64_t token = tokens_.back();
    if (drafter_) drafter_->push(token);
    if (row_ < draft_.size() && draft_[row_] == token) {
      request_->accept_draft();
      ++stats_.accepted_tokens;
      ++row_;
    } else {
      draft_.clear();
      if (drafter_) draft_ = drafter_->draft(request_->max_tokens - stats_.completion_tokens - 1);
      stats_.drafted_tokens += static_cast<int64_t>(draft_.size());
      std::vector<int64_t> fed = {token};
      fed.insert(fed.end(), draft_.begin(), draft_.end());
      logits_ = request_->verify_draft(fed);
      row_ = 0;
    }
    if (monitor_) monitor_->read(request_->hidden_state(row_));
    stats_.decode_ms += clock.ms();
    return choose();
  }

  /// Sample the next token; its chunk.
  Chunk choose() {
    const auto vocabulary = static_cast<size_t>(engine_.manifest.dims.vocab_size);
    const float* row = logits_ + row_ * vocabulary;
    const int64_t token = sample_({row, row + vocabulary}, tokens_, prompt_tokens_);
    tokens_.push_back(token);
    ++stats_.completion_tokens;
    const auto& ends = engine_.manifest.prompt.end_token_ids;
    const bool end = std::find(ends.begin(), ends.end(), token) != ends.end();
    Chunk chunk{end ? "" : detokeniser_.push(token), token, verdict_, "", std::nullopt};
    if (end || detokeniser_.stopped) {
      chunk.finish_reason = "stop";
    } else if (stats_.completion_tokens == request_->max_tokens) {
      chunk.finish_reason = "length";
    }
    if (!chunk.finish_reason.empty()) chunk.text += detokeniser_.flush();
    return chunk;
  }

  /// Compute a chunk. With an audit record the last text waits until the line about the answer is written; its end is
  /// often a chunk without text.
  void compute_next() {
    held_.push_back(cancellation_.guard(next_));
    Chunk& chunk = held_.back();
    if (stats_.ttft_ms == 0) stats_.ttft_ms = clock_.ms();
    const bool last = !chunk.finish_reason.empty();
    if (last) {
      chunk.stats = stats_;
      record_.verdict = chunk.verdict;
      leave();
    }
    const bool waits = !last && record_.is_audited();
    if (waits && chunk.text.empty()) return;
    const auto end = held_.end() - (waits ? 1 : 0);
    for (auto one = held_.begin(); one != end; ++one) record_.gave(one->text, one->finish_reason);
    std::move(held_.begin(), end, std::back_inserter(ready_));
    held_.erase(held_.begin(), end);
  }

  const Engine& engine_;
  Conversation own_;  // of a stream that has no other
  Conversation* conversation_;
  const std::vector<Message> messages_;
  Prepare prepare_;
  GatePolicy policy_;
  SamplingConfig sampling_;
  Sampler sample_;
  Detokeniser detokeniser_;
  Stats stats_;
  Verdict verdict_;
  std::vector<int64_t> tokens_;
  size_t prompt_tokens_ = 0;  // of them
  std::optional<Request> request_;
  std::optional<Drafter> drafter_;
  std::vector<int64_t> draft_;
  const float* logits_ = nullptr;  // (R, V) of the latest pass
  size_t row_ = 0;                 // the one to sample from
  std::optional<Monitor> monitor_;
  NextChunk next_ = [this] { return request_ ? continue_answer() : begin_answer(); };
  Clock clock_;  // from the call that begins the answer
  Cancellation cancellation_;
  Record record_;  // refers to what is above
  std::deque<Chunk> held_, ready_;  // chunks that wait for the audit record; those that can be handed over
  bool ended_ = false;
};

inline Stream Engine::stream(std::vector<Message> messages, const SamplingConfig& sampling, const GatePolicy& policy,
                             Conversation* conversation) const {
  check_files(messages);
  const auto prepare = [this](const std::vector<Message>& messages, Stats& stats, Conversation* conversation) {
    return encode(messages, stats, conversation);
  };
  return {*this, std::move(messages), prepare, sampling, policy, conversation};
}

inline Answer Engine::generate(std::vector<Message> messages, const SamplingConfig& sampling, const GatePolicy& policy,
                               const std::function<void(const Chunk&)>& on_chunk, Conversation* conversation) const {
  return stream(std::move(messages), sampling, policy, conversation).whole(on_chunk);
}

inline Answer Engine::generate_encoded(const std::function<EncodedPrompt(Stats&)>& encode,
                                       const SamplingConfig& sampling, const GatePolicy& policy) const {
  const auto prepare = [&](const std::vector<Message>&, Stats& stats, Conversation*) { return encode(stats); };
  return Stream(*this, {}, prepare, sampling, policy, nullptr).whole();
}

}  // namespace autosteer
