// Asks a package's prober about a dialogue, and about an answer that is judged (held_back.hpp). The C++ side of
// runtime/judge.py: readings.hpp says what is read.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "audit.hpp"
#include "conversation.hpp"
#include "digest.hpp"
#include "encoded_prompt.hpp"
#include "errors.hpp"
#include "gate.hpp"
#include "generation.hpp"
#include "log.hpp"
#include "packed.hpp"
#include "pieces.hpp"
#include "prompt_encoder.hpp"
#include "readings.hpp"
#include "stats.hpp"
#include "text.hpp"

namespace autosteer {

/// The messages without the pixels of their pictures and videos. These are encoded already, and each reading copies
/// its turn.
inline std::vector<Message> without_pixels(const std::vector<Message>& messages) {
  std::vector<Message> same;
  for (const Message& message : messages) {
    Message& turn = same.emplace_back(Message{message.role, {}, message.trusted});
    for (const Part& part : message.parts) {
      if (const auto* text = std::get_if<std::string>(&part)) {
        turn.parts.emplace_back(*text);
      } else if (const auto* video = std::get_if<VideoPart>(&part)) {
        turn.parts.emplace_back(VideoPart{std::vector<ImageLike>(video->frames.size()), video->seconds});
      } else {
        turn.parts.emplace_back(ImageLike());
      }
    }
  }
  return same;
}

/// What is seen of each picture and video, in the order of the messages' parts. (A template may write a turn's pictures
/// before its videos: `seen` has them so.)
inline std::vector<std::vector<Seen>> by_picture(const std::vector<Message>& messages, const std::vector<Seen>& seen) {
  std::vector<std::vector<Seen>> pictures, videos, found;
  for (const Seen& one : seen) {
    auto& of_kind = one.video ? videos : pictures;
    if (one.row == 0) of_kind.emplace_back();
    of_kind.back().push_back(one);
  }
  if (seen.empty()) return found;  // nothing is seen of token ids
  size_t picture = 0, video = 0;
  for (const auto& [n, part] : shown_by_turn(messages)) {
    const bool is_video = std::holds_alternative<VideoPart>(part);
    found.push_back(is_video ? videos.at(video++) : pictures.at(picture++));
  }
  return found;
}

/// The pictures of numbers `which`.
inline std::vector<Seen> only(const std::vector<std::vector<Seen>>& pictures, const Span& which) {
  std::vector<Seen> seen;
  for (size_t i = which.first; i < which.second; ++i) seen.insert(seen.end(), pictures[i].begin(), pictures[i].end());
  return seen;
}

/// What a reading's messages say and show: two with the same key have the same score. `seen`: its pictures and videos
/// as the dialogue has them. They count by their pixels and by how they are encoded, not by their files' names.
inline ReadingKey reading_key(const std::vector<Message>& messages, const std::vector<Seen>& seen) {
  Sha256 key;
  const auto add = [&](const std::string& item) {
    const std::string size = std::to_string(item.size()) + " ";
    key.add(size.data(), size.size());
    key.add(item.data(), item.size());
  };
  for (const Message& message : messages) {
    add("role " + message.role);
    for (const Part& part : message.parts) {
      if (const auto* text = std::get_if<std::string>(&part)) {
        add("text " + *text);
      } else if (const auto* video = std::get_if<VideoPart>(&part)) {
        const auto* bytes = reinterpret_cast<const char*>(video->seconds.data());
        add("video " + std::to_string(video->frames.size()) + " " +
            std::string(bytes, bytes + video->seconds.size() * sizeof(double)));
      } else {
        add("image");
      }
    }
  }
  for (const Seen& one : seen) add("seen " + one.key);
  return key.hex();
}

constexpr size_t kTogether = 32;  // readings whose scores are looked at when all are known, if they can share passes
constexpr size_t kMostRows = 4096;  // of readings that are encoded at once: a picture has its rows in each of them

/// Asks a package's prober. What it is given must outlive it.
class Judge {
 public:
  /// Makes a request that gives no answer, and starts from what the conversation keeps.
  using Ask = std::function<Request(EncodedPrompt, Stats&, Conversation&)>;

  /// `read_packed` of packed.hpp; empty if the package cannot.
  using ReadPacked = std::function<std::vector<double>(CachedPrefix&, const std::vector<const EncodedPrompt*>&)>;

  Judge(const PromptEncoder& encoder, Ask ask, ReadPacked read_packed, int split_layer, const Log& log)
      : encoder_(encoder),
        ask_(std::move(ask)),
        read_packed_(std::move(read_packed)),
        split_layer_(split_layer),
        log_(log) {}

  /// The verdict on the prompt of `request`, noted in `record`, which has its messages and what they show.
  /// `conversation`: scores that it knows of other readings of its turns are not computed again. Throws InputError if
  /// there are no messages, and pieces are wanted; and for too many readings.
  Verdict prompt(Request& request, Record& record, const GatePolicy& policy, Conversation* conversation) const {
    if (policy.mode != Mode::off && policy.pieces && record.messages.empty()) {
      throw InputError("a turn cannot be read in all its forms without the messages: give a policy without pieces");
    }
    Verdict verdict = request.prefill_lower(policy);
    const Clock clock;
    Forms forms{request.scores, policy.threshold, conversation ? &conversation->known_scores : nullptr};
    if (verdict.p_unsafe) {
      read_forms(request, record, policy, forms);
      bool stopped = forms.stopped;
      double p_unsafe = *verdict.p_unsafe;
      for (size_t at = 0; at < forms.scores.size(); ++at) {
        p_unsafe = worse(p_unsafe, forms.scores[at]);
        const bool is_earlier = at + 1 < forms.scores.size();
        stopped = stopped || (is_earlier && policy.checks_steering() && forms.is_unsafe(forms.scores[at]));
      }
      verdict = decide(p_unsafe, stopped ? without_steering(policy) : policy, split_layer_);
      record.stats.gate_ms += clock.ms();
    }
    if (conversation) conversation->known_scores = std::move(forms.known);
    record.verdict = verdict;
    record.scores = std::move(forms.scores);
    return verdict;
  }

  /// The worst p_unsafe of `text`, the answer of `request` to the prompt that is noted in `record` with its verdict, of
  /// all readings up to some behind the first that is unsafe; NaN of none, or if one cannot be read.
  double answer(const std::string& text, const Request& request, const Record& record) const {
    const GatePolicy& policy = record.policy;
    const std::vector<Message> messages = without_pixels(record.messages);
    const Views views = each_shown(messages, record.seen, true);
    const Verdict& verdict = record.verdict.value();
    std::optional<double> p_unsafe;
    Begun begun;
    std::vector<Reading> some;
    const auto read_some = [&] {
      std::vector<const Reading*> wanted;
      for (const Reading& reading : some) wanted.push_back(&reading);
      const std::vector<double> found = read_all(wanted, views.seen, policy, begun, request);
      for (size_t i = 0; i < some.size(); ++i) {
        const double p = some[i].discounted ? discounted(found[i]) : found[i];
        p_unsafe = p_unsafe ? worse(*p_unsafe, p) : p;
      }
      some.clear();
      return !p_unsafe || is_safe(*p_unsafe, verdict.judged_above());
    };
    for_each_reading_of_answer(messages, text, views.frames, verdict.action == Action::steer, [&](Reading reading) {
      some.push_back(std::move(reading));
      return some.size() < together() || read_some();
    });
    if (!p_unsafe || is_safe(*p_unsafe, verdict.judged_above())) read_some();
    return p_unsafe.value_or(std::nan(""));
  }

 private:
  struct Views {
    std::vector<std::vector<Seen>> seen;  // of each picture and video, then of each of `frames`
    std::vector<ShownBy> frames;          // of the videos (PromptEncoder::single_frames)
  };

  /// What readings start from, by Reading::prefix.
  using Begun = std::map<Prefix, Conversation>;

  /// What the forms of a dialogue's judged turns score, and what follows.
  struct Forms {
    std::vector<double> scores;                // the worst of each turn so far
    double threshold;
    const std::map<ReadingKey, double>* kept;  // scores that the conversation knows, if there is one
    std::map<ReadingKey, double> known = {};   // scores of this dialogue's readings
    bool stopped = false;                      // whether a form is unsafe that stops the request

    bool is_unsafe(double p) const { return !is_safe(p, threshold); }

    /// Whether a reading of a judged turn still does.
    bool counts(size_t at, const Reading& reading) const {
      return !(reading.skip_if_unsafe && is_unsafe(scores.at(at)));
    }

    /// The score of a reading, if it is known.
    std::optional<double> score_of(const ReadingKey& key) const {
      for (const auto* scores : {&known, kept}) {
        if (!scores) continue;
        if (const auto found = scores->find(key); found != scores->end()) return found->second;
      }
      return std::nullopt;
    }

    /// A reading of a judged turn has this score; it changes nothing if it does not count.
    void note(size_t at, const Reading& reading, double p_unsafe) {
      if (!counts(at, reading)) return;
      const double p = reading.discounted ? discounted(p_unsafe) : p_unsafe;
      scores.at(at) = worse(scores.at(at), p);
      stopped = stopped || (reading.stop_if_unsafe && is_unsafe(p));
    }
  };

  /// Note in `forms` what the forms of the turns score that are not read where the turns stand.
  void read_forms(const Request& request, const Record& record, const GatePolicy& policy, Forms& forms) const {
    const std::vector<Message> messages = without_pixels(record.messages);
    const Views views = each_shown(messages, record.seen, policy.pieces);
    const std::vector<std::optional<Message>> plain = plain_turns(messages);
    Begun begun;
    const auto in_letters = [](const auto& letters) { return letters.has_value(); };
    if (messages.size() > 1 && std::any_of(plain.begin(), plain.end(), in_letters)) {
      const Reading whole{with_letters_of(plain, messages), {}, true, true};
      std::vector<double> found(forms.scores.size(), std::nan(""));
      if (auto letters = encode(whole.messages, record.seen, found.size())) {
        found = score(std::move(*letters), policy, before(begun, Prefix::plain_dialogue, request));
      }
      for (size_t at = 0; at < forms.scores.size(); ++at) forms.note(at, whole, found.at(at));
    }
    std::map<size_t, size_t> places;  // of judged turns, among these
    for (size_t n = 0; n < messages.size(); ++n) {
      if (is_judged(messages, n)) places.emplace(n, places.size());
    }
    std::vector<std::pair<size_t, Reading>> some;  // by place
    const auto read_some = [&] {
      std::vector<ReadingKey> keys;
      std::map<ReadingKey, double> scored;
      std::map<ReadingKey, size_t> place_of;  // among `wanted`
      std::vector<const Reading*> wanted;
      for (const auto& [at, reading] : some) {
        const ReadingKey& key = keys.emplace_back(reading_key(reading.messages, only(views.seen, reading.pictures)));
        if (const std::optional<double> p = forms.score_of(key)) {
          scored.emplace(key, *p);
        } else if (forms.counts(at, reading) && place_of.emplace(key, wanted.size()).second) {
          wanted.push_back(&reading);
        }
      }
      const std::vector<double> found = read_all(wanted, views.seen, policy, begun, request);
      for (const auto& [key, place] : place_of) scored.emplace(key, found.at(place));
      for (const auto& [key, p] : scored) {
        if (!std::isnan(p)) forms.known.emplace(key, p);  // a failure may pass
      }
      for (size_t i = 0; i < some.size(); ++i) {
        const auto p = scored.find(keys[i]);  // what does not count may be missing
        forms.note(some[i].first, some[i].second, p == scored.end() ? std::nan("") : p->second);
      }
      some.clear();
    };
    const auto take = [&](size_t n, Reading reading) {
      some.emplace_back(places.at(n), std::move(reading));
      if (some.size() == together()) read_some();
    };
    for_each_reading(messages, plain, policy.pieces, policy.judge_answers, views.frames, take);
    read_some();
  }

  /// At first what `request` computed of its prompt, then what the reading before computed.
  static Conversation& before(Begun& begun, Prefix prefix, const Request& request) {
    const auto [found, is_new] = begun.try_emplace(prefix);
    if (is_new) found->second.keep_prefix(request.lend_prefix());
    return found->second;
  }

  size_t together() const { return read_packed_ ? kTogether : 1; }

  Views each_shown(const std::vector<Message>& messages, const std::vector<Seen>& seen, bool frames) const {
    Views views{by_picture(messages, seen), {}};
    if (!frames || seen.empty()) return views;  // nothing is seen of token ids
    size_t number = 0;
    for (const auto& [n, part] : shown_by_turn(messages)) {
      const std::vector<Seen> whole = views.seen.at(number++);
      const auto* video = std::get_if<VideoPart>(&part);
      if (!video) continue;
      for (auto& [frame, rows] : encoder_.single_frames(*video, whole)) {
        views.frames.emplace_back(n, std::move(frame));
        views.seen.push_back({std::move(rows)});
      }
    }
    return views;
  }

  /// p_unsafe of the last turn of each reading; NaN if it cannot be read.
  std::vector<double> read_all(const std::vector<const Reading*>& readings, const std::vector<std::vector<Seen>>& shown,
                               const GatePolicy& policy, Begun& begun, const Request& request) const {
    std::vector<double> found(readings.size(), std::nan(""));
    using Beginning = std::tuple<Prefix, size_t, Span>;  // ..., how many messages, the pictures
    std::vector<std::pair<Beginning, std::vector<size_t>>> alike;  // in the order of their first
    for (size_t i = 0; i < readings.size(); ++i) {
      const auto [from, to] = readings[i]->pictures;
      const Beginning beginning{readings[i]->prefix, readings[i]->messages.size(), from < to ? Span{from, to} : Span{}};
      const auto is_same = [&](const auto& group) { return group.first == beginning; };
      auto group = std::find_if(alike.begin(), alike.end(), is_same);
      if (group == alike.end()) group = alike.insert(alike.end(), {beginning, {}});
      group->second.push_back(i);
    }
    for (const auto& [beginning, members] : alike) {
      const std::vector<Seen> seen = only(shown, std::get<Span>(beginning));
      std::vector<EncodedPrompt> prompts;
      std::vector<size_t> numbers;
      size_t rows = 0;
      for (const size_t i : members) {
        if (std::optional<EncodedPrompt> prompt = encode(readings[i]->messages, seen)) {
          rows += prompt->keys.size();
          prompts.push_back(std::move(*prompt));
          numbers.push_back(i);
        }
        if (i != members.back() && rows <= kMostRows) continue;
        Conversation& start = before(begun, std::get<Prefix>(beginning), request);
        const std::vector<double> scores = score_alike(std::exchange(prompts, {}), policy, start);
        for (size_t k = 0; k < numbers.size(); ++k) found[numbers[k]] = scores[k];
        numbers.clear();
        rows = 0;
      }
    }
    return found;
  }

  /// p_unsafe of the last turn of prompts that begin alike: those that are short share passes, if the package can. They
  /// start from what `begun` has, and leave it more.
  std::vector<double> score_alike(std::vector<EncodedPrompt> prompts, const GatePolicy& policy,
                                  Conversation& begun) const {
    std::map<size_t, double> found;
    if (read_packed_ && prompts.size() > 1) {
      if (!begun.prefix() || first_is_read_alone(prompts, *begun.prefix())) {
        found[0] = score(prompts[0], policy, begun).back();
      }
      if (std::optional<CachedPrefix> prefix = begun.take_prefix()) {
        const std::vector<size_t> numbers = can_share_a_pass(prompts, found.size(), *prefix);
        std::vector<const EncodedPrompt*> together;
        for (const size_t i : numbers) together.push_back(&prompts[i]);
        if (!together.empty()) {
          const std::vector<double> scores = read_packed_(*prefix, together);
          for (size_t k = 0; k < numbers.size(); ++k) found[numbers[k]] = scores[k];
        }
        begun.keep_prefix(std::move(*prefix));
      }
    }
    std::vector<double> scores;
    for (size_t i = 0; i < prompts.size(); ++i) {
      const auto known = found.find(i);
      scores.push_back(known == found.end() ? score(std::move(prompts[i]), policy, begun).back() : known->second);
    }
    return scores;
  }

  /// A dialogue of which `turns` are judged, with its pictures and videos as `seen` has them; nothing if it cannot be
  /// read.
  std::optional<EncodedPrompt> encode(const std::vector<Message>& messages, const std::vector<Seen>& seen,
                                      size_t turns = 1) const {
    try {
      Stats stats;
      return encoder_.prepare_seen(messages, seen, stats, turns);
    } catch (const InputError& err) {
      note_failure(err);
      return std::nullopt;
    }
  }

  /// p_unsafe of the judged turns of `prompt`; NaN if it cannot be read. It starts from what `begun` has, and leaves it
  /// more.
  std::vector<double> score(EncodedPrompt prompt, const GatePolicy& policy, Conversation& begun) const {
    const size_t turns = prompt.probed.size();
    Stats stats;
    try {
      Request request = ask_(std::move(prompt), stats, begun);
      request.prefill_lower(policy);
      begun.keep_prefix(request.cached_prefix());
      return request.scores;
    } catch (const InputError& err) {
      note_failure(err);
      return std::vector<double>(turns, std::nan(""));
    }
  }

  void note_failure(const InputError& err) const {
    const std::string reason = err.what();
    if (log_) log_("a text could not be judged, so it counts as unsafe: " + reason);
  }

  const PromptEncoder& encoder_;
  const Ask ask_;
  const ReadPacked read_packed_;
  const int split_layer_;
  const Log& log_;
};

}  // namespace autosteer
