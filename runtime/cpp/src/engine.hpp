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

#include <sched.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "audit.hpp"
#include "conversation.hpp"
#include "draft_table.hpp"
#include "drafting.hpp"
#include "errors.hpp"
#include "gate.hpp"
#include "generation.hpp"
#include "image.hpp"
#include "manifest.hpp"
#include "monitor.hpp"
#include "pages.hpp"
#include "prompt_encoder.hpp"
#include "sampling.hpp"
#include "self_test.hpp"
#include "subgraph.hpp"
#include "text.hpp"
#include "tokenizer.hpp"

namespace autosteer {

constexpr int64_t kMaxThreads = 1024;  // more is taken for a typing error

/// A piece of an answer. `text` is empty while a character is incomplete.
struct Chunk {
  std::string text;
  std::optional<int64_t> token;  ///< absent for the refusal text
  Verdict verdict;
  /// On the last chunk "stop", "length" or "refused" (by Mode::stop, the monitor, or the verdict on a biased answer);
  /// else empty
  std::string finish_reason;
  std::optional<Stats> stats;  ///< on the last chunk
};

/// A whole answer, as `generate` returns it.
struct Answer {
  std::string text;
  std::vector<int64_t> token_ids;  ///< with the end-of-turn token if the model wrote one
  Verdict verdict;
  std::string finish_reason;
  Stats stats;
};

/// How to load a package.
struct EngineOptions {
  std::string device = "auto";            ///< auto or cpu
  int threads = 0;                        ///< 0: every CPU this process may use
  std::optional<int64_t> max_tiles = {};  ///< cut a picture into at most this many tiles
  bool low_memory = false;                ///< check and load the image graph for each picture, then drop it
  bool files = true;                      ///< whether messages may name files of pictures
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
  /// ProviderError (device not available, onnxruntime too old) or InputError (no such folder for EngineOptions::audit).
  explicit Engine(const fs::path& folder, const EngineOptions& options = {})
      : pages_(options.advise_pages ? std::make_unique<Pages>() : nullptr),
        manifest(Manifest::load(folder)),
        log(options.log),
        audit_(options.audit.empty() ? nullptr
                                     : std::make_unique<Audit>(options.audit, sha256(folder / kManifestFile),
                                                               options.audit_texts)),
        tokenizer(checked(folder, options.onnxruntime)),
        encoder(manifest, tokenizer, options.max_tiles, [this](const auto& name) { return graph(name); }),
        folder_(fs::absolute(folder)),
        files_(options.files) {
    if (options.device != "auto" && options.device != "cpu") {
      throw ProviderError("--device " + options.device + ": the C++ runtime binds CPU buffers only; use --device cpu");
    }
    environment_.emplace(options.threads > 0 ? options.threads : usable_cpus());
    const auto load = [&](const std::string& name, const GraphSpec& spec) {
      if (options.low_memory && kImageGraphs.count(name)) return;
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
    if (pages_) pages_->place();
  }
  Engine(const Engine&) = delete;  // the encoder points into it
  Engine& operator=(const Engine&) = delete;

  /// The package's policy with your overrides. Throws PackageError if `mode` needs a gate and the package has none,
  /// InputError for numbers out of range.
  GatePolicy policy(Mode mode = Mode::steer, std::optional<double> threshold = {},
                    std::optional<double> strength = {}) const {
    if (!manifest.prober || !manifest.refusal) {
      if (mode != Mode::off) {
        throw PackageError(
            "this package was exported with --unguarded: it has no prober and no refusal head; "
            "run it with --policy off, or export it again with --safety");
      }
      return {mode, 0.0, 0.0, ""};
    }
    GatePolicy policy{mode, threshold.value_or(manifest.prober->threshold),
                      strength.value_or(manifest.refusal->strength), manifest.refusal->text};
    if (manifest.monitor) policy.answer_threshold = manifest.monitor->threshold;
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

  /// The verdict on a dialogue, without an answer: decoder_upper never runs. Throws InputError if the prompt, an image
  /// or a video is unusable, or does not fit the context.
  Verdict score(const std::vector<Message>& messages, const GatePolicy& policy) const {
    check_files(messages);
    policy.check();
    Stats stats;
    Record record = this->record(policy, messages, stats);
    record.begin();
    try {
      Conversation own;
      EncodedPrompt prompt = encoder.prepare(messages, stats, &own);
      record.shown = prompt.shown;
      Request asked = request(std::move(prompt), 1, stats);
      record.verdict = judge(asked, messages, policy, stats, record.scores, &own);
      record.gave("", "scored");
      return *record.verdict;
    } catch (...) {
      record.failed(std::current_exception());
      throw;
    }
  }

  /// The verdict on the prompt of `asked`, and `scores` by judged turn. A user's turn is judged where it stands and by
  /// itself: an answered question before it can draw the prober's eye from it. The worst score counts.
  Verdict judge(Request& asked, const std::vector<Message>& messages, const GatePolicy& policy, Stats& stats,
                std::vector<double>& scores, Conversation* conversation = nullptr) const {
    Verdict verdict = asked.prefill_lower(policy);
    const Clock clock;
    scores = asked.scores;
    std::map<std::vector<Key>, double> alone;
    if (verdict.p_unsafe && messages.size() > 1) {
      double p_unsafe = *verdict.p_unsafe;
      size_t at = 0, pictures = 0;
      for (const Message& message : messages) {
        for (const Part& part : message.parts) pictures += std::holds_alternative<ImageLike>(part);
      }
      for (size_t turn = 0; turn < messages.size(); ++turn) {
        if (!is_judged(messages, turn)) continue;
        double& score = scores[at++];
        if (turn == 0) continue;  // what stands first is read alike by itself: nothing is before it
        if (messages[turn].role != "user") continue;
        const double p = score_alone(messages[turn], pictures > 1, policy, conversation, alone);
        score = worse(score, p);
        p_unsafe = worse(p_unsafe, p);
      }
      verdict = decide(p_unsafe, policy, manifest.split_layer);
      stats.gate_ms += clock.ms();
    }
    if (conversation) conversation->alone = std::move(alone);
    return verdict;
  }

  /// p_unsafe of a user's turn as a prompt of its own; NaN if none that fits. Noted in `known`, if it is a number:
  /// a failure may pass. `several`: the dialogue has several pictures, so this turn's are encoded as there.
  double score_alone(const Message& turn, bool several, const GatePolicy& policy, const Conversation* conversation,
                     std::map<std::vector<Key>, double>& known) const {
    Conversation aside;
    if (conversation) aside.images = conversation->images;  // not encoded again
    Stats own;
    std::optional<EncodedPrompt> prompt;
    try {
      prompt = encoder.prepare(std::vector<Message>(1, turn), own, &aside, several);
    } catch (const InputError& err) {
      const std::string reason = err.what();
      if (log) log("a turn could not be judged by itself; the prompt counts as unsafe (" + reason + ")");
      return std::nan("");
    }
    const std::vector<Key> key = prompt->keys;
    if (const auto found = known.find(key); found != known.end()) return found->second;
    double p = std::nan("");
    const auto before = conversation ? conversation->alone.find(key) : known.end();
    if (conversation && before != conversation->alone.end()) {
      p = before->second;
    } else {
      p = request(std::move(*prompt), 1, own).prefill_lower(policy).p_unsafe.value_or(p);
    }
    if (!std::isnan(p)) known[key] = p;
    return p;
  }

  /// `generate` for a prompt of one user turn without pictures, given as the token ids of the whole rendered prompt.
  Answer generate_from_ids(const std::vector<int64_t>& token_ids, const SamplingConfig& sampling,
                           const GatePolicy& policy) const;

  /// Throws InputError for a picture that is the name of a file, where EngineOptions::files forbids them.
  void check_files(const std::vector<Message>& messages) const {
    const auto is_file = [](const ImageLike& image) { return std::holds_alternative<fs::path>(image); };
    for (const Message& message : messages) {
      for (const Part& part : message.parts) {
        const auto* image = std::get_if<ImageLike>(&part);
        const auto* video = std::get_if<VideoPart>(&part);
        const bool named = (image && is_file(*image)) ||
                           (video && std::any_of(video->frames.begin(), video->frames.end(), is_file));
        if (named && !files_) throw InputError("a picture is the name of a file, which this engine does not open");
      }
    }
  }

  /// Tokens of the prompt that these messages become, those of pictures and videos included. The decoder does not run.
  int64_t count_tokens(const std::vector<Message>& messages) const {
    check_files(messages);
    Stats stats;
    return encoder.prepare(messages, stats).inputs_embeds.count();
  }

  /// Buffers and caches for one answer. Throws InputError if the prompt does not fit the context.
  Request request(EncodedPrompt prompt, int64_t max_tokens, Stats& stats, Conversation* conversation = nullptr) const {
    const int64_t length = prompt.inputs_embeds.count(), context = manifest.dims.context_length;
    check_length(manifest, length);
    return {manifest,
            graphs_,
            log,
            std::move(prompt),
            std::min(max_tokens, manifest.rotary.room(length, context)),
            stats,
            conversation ? conversation->take_prefix() : std::nullopt};
  }

  /// Where a request notes what becomes of it. What it is given must outlive it.
  Record record(const GatePolicy& policy, const std::vector<Message>& messages, const Stats& stats) const {
    return {audit_.get(), policy, messages, stats};
  }

  const Manifest manifest;
  const Log log;

  const Graphs& graphs() const { return graphs_; }

  /// The package's table of n-grams; null if it has none.
  const DraftTable* drafts() const { return drafts_ ? &*drafts_ : nullptr; }

 private:
  const std::unique_ptr<Audit> audit_;  // opened before the package's files are read

 public:
  const Tokenizer tokenizer;
  const PromptEncoder encoder;

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

  static int usable_cpus() {
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(CPU_COUNT(&set), 1);
    return static_cast<int>(std::max(std::thread::hardware_concurrency(), 1U));
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
      Chunk chunk = cancellation_.guard([&] { return judging() ? judged_chunk() : next_chunk(); });
      if (stats_.ttft_ms == 0) stats_.ttft_ms = clock_.ms();
      const bool last = !chunk.finish_reason.empty();
      if (last) {
        chunk.stats = stats_;
        record_.verdict = chunk.verdict;
        leave();
      }
      record_.gave(chunk.text, chunk.finish_reason);
      ended_ = last;
      return chunk;
    } catch (...) {
      record_.failed(std::current_exception());
      throw;
    }
  }

  /// End the answer: a `next` that is running throws Cancelled soon, and so does the next one. For any thread.
  void cancel() { cancellation_.cancel(); }

 private:
  /// End the answer, and give the cached prefix back to the conversation.
  void leave() {
    if (request_ && conversation_ != &own_) conversation_->keep_prefix(request_->cached_prefix());
    request_.reset();
  }

  bool watching() const { return engine_.manifest.monitor && policy_.answer_threshold && policy_.mode != Mode::off; }

  bool judging() const { return sampling_.restricts() && policy_.mode != Mode::off; }

  Chunk next_chunk() { return watching() ? watched_chunk() : compute(); }

  Chunk compute() { return request_ ? continue_answer() : begin_answer(); }

  /// The next chunk that the monitor has seen through; see monitor.hpp.
  Chunk watched_chunk() {
    if (!monitor_) monitor_.emplace(engine_.manifest, engine_.graphs(), engine_.log, policy_, stats_);
    while (held_.empty() || (monitor_->stops && !computed_ && held_.size() <= monitor_->window)) {
      Chunk chunk = compute();
      computed_ = !chunk.finish_reason.empty();
      if (computed_) monitor_->end();
      const std::optional<Watched> seen = monitor_->verdict();
      const Verdict verdict = watched(chunk.verdict, seen);
      if (seen && seen->unsafe && monitor_->stops) {
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

  /// The next chunk of an answer whose tokens the request biases. All wait for the gate's verdict on the whole, as if
  /// the user had said it: a bias can dictate an unsafe request, and the answer to it (runtime/held_back.py).
  Chunk judged_chunk() {
    const bool stops = policy_.mode != Mode::report;
    while (judged_.empty() || (stops && !whole_)) {
      Chunk chunk = next_chunk();
      if (chunk.finish_reason == "refused") {
        chunk.text = policy_.refusal_text;  // nothing was shown before it
        return chunk;
      }
      said_ += chunk.text;
      whole_ = !chunk.finish_reason.empty();
      if (whole_ && !is_blank(said_)) {
        const double p_unsafe = score_of(said_);
        const Watched seen{p_unsafe, !is_safe(p_unsafe, policy_.threshold), policy_.threshold};
        if (seen.unsafe || !chunk.verdict.monitor) chunk.verdict = watched(chunk.verdict, seen);
        if (chunk.verdict.action == Action::stop) {
          return {policy_.refusal_text, std::nullopt, chunk.verdict, "refused", std::nullopt};
        }
      }
      judged_.push_back(std::move(chunk));
    }
    Chunk chunk = std::move(judged_.front());
    judged_.pop_front();
    return chunk;
  }

  static bool is_blank(const std::string& text) {
    return std::all_of(text.begin(), text.end(), is_space);
  }

  static bool is_space(char c) { return c == ' ' || ('\t' <= c && c <= '\r'); }

  /// The text up to its 16th, 32nd, 64th, ... word, and the whole: biased tokens, which may leave out the one that ends
  /// the answer, can drown what it begins with. Words end at ASCII white space.
  static std::vector<std::string> beginnings(const std::string& text) {
    std::vector<std::string> found;
    size_t words = 0, next = 16;
    for (size_t at = 0; at < text.size(); ++at) {
      const bool ends = !is_space(text[at]) && at + 1 < text.size() && is_space(text[at + 1]);
      if (!ends || ++words < next) continue;
      found.push_back(text.substr(0, at + 1));
      next *= 2;
    }
    found.push_back(text);
    return found;
  }

  /// The worst p_unsafe of an answer's beginnings, each as a user's prompt; NaN if one cannot be read.
  double score_of(const std::string& answer) const {
    double p_unsafe = 0.0;
    try {
      for (const std::string& said : beginnings(answer)) {
        Stats stats;
        EncodedPrompt prompt = engine_.encoder.prepare({Message::user(said)}, stats);
        const Verdict verdict = engine_.request(std::move(prompt), 1, stats).prefill_lower(policy_);
        p_unsafe = worse(p_unsafe, verdict.p_unsafe.value_or(std::nan("")));
      }
    } catch (const InputError& err) {
      const std::string reason = err.what();
      if (engine_.log) engine_.log("the answer could not be judged; it counts as unsafe (" + reason + ")");
      return std::nan("");
    }
    return p_unsafe;
  }

  Chunk begin_answer() {
    EncodedPrompt prompt = prepare_(messages_, stats_, conversation_);
    tokens_ = prompt.token_ids;
    record_.shown = prompt.shown;
    request_.emplace(engine_.request(std::move(prompt), sampling_.max_tokens, stats_, conversation_));
    prompt_tokens_ = tokens_.size();
    const GatePolicy policy = sampling_.restricts() ? without_steering(policy_) : policy_;
    verdict_ = engine_.judge(*request_, messages_, policy, stats_, record_.scores, conversation_);
    record_.verdict = verdict_;
    if (verdict_.action == Action::stop) {
      return {policy_.refusal_text, std::nullopt, verdict_, "refused", std::nullopt};
    }
    if (verdict_.action == Action::steer) sample_ = Sampler(sampling_.greedy());
    if (sampling_.speculate) {
      drafter_.emplace(tokens_, kPositionCost.at(engine_.manifest.graphs.at("decoder_lower").precision),
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
  std::deque<Chunk> held_;    // the monitor has not seen these through
  bool computed_ = false;     // the answer's last chunk is among them
  bool shown_ = false;        // some text
  std::deque<Chunk> judged_;  // the gate has not judged these, or they may be shown
  std::string said_;          // their text
  bool whole_ = false;        // the answer's last chunk is among them
  Clock clock_;               // from the call that begins the answer
  Cancellation cancellation_;
  Record record_;  // refers to what is above
  bool ended_ = false;
};

inline Stream Engine::stream(std::vector<Message> messages, const SamplingConfig& sampling, const GatePolicy& policy,
                             Conversation* conversation) const {
  check_files(messages);
  const auto prepare = [this](const std::vector<Message>& messages, Stats& stats, Conversation* conversation) {
    return encoder.prepare(messages, stats, conversation);
  };
  return {*this, std::move(messages), prepare, sampling, policy, conversation};
}

namespace detail {

/// All chunks of a stream as one answer.
inline Answer whole(Stream&& pieces, const std::function<void(const Chunk&)>& on_chunk = {}) {
  Answer answer;
  while (const std::optional<Chunk> chunk = pieces.next()) {
    answer.text += chunk->text;
    if (chunk->token) answer.token_ids.push_back(*chunk->token);
    answer.verdict = chunk->verdict;
    answer.finish_reason = chunk->finish_reason;
    if (chunk->stats) answer.stats = *chunk->stats;
    if (on_chunk) on_chunk(*chunk);
  }
  return answer;
}

}  // namespace detail

inline Answer Engine::generate(std::vector<Message> messages, const SamplingConfig& sampling, const GatePolicy& policy,
                               const std::function<void(const Chunk&)>& on_chunk, Conversation* conversation) const {
  return detail::whole(stream(std::move(messages), sampling, policy, conversation), on_chunk);
}

inline Answer Engine::generate_from_ids(const std::vector<int64_t>& token_ids, const SamplingConfig& sampling,
                                        const GatePolicy& policy) const {
  const auto prepare = [&](const std::vector<Message>&, Stats& stats, Conversation*) {
    return encoder.prepare_ids(token_ids, stats);
  };
  return detail::whole(Stream(*this, {}, prepare, sampling, policy, nullptr));
}

}  // namespace autosteer
