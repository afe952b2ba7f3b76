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
  size_t picture = 0, video = 0;
  for (const Message& message : messages) {
    for (const Part& part : shown_in(message)) {
      if (seen.empty()) break;  // it was given as token ids
      const bool is_video = std::holds_alternative<VideoPart>(part);
      found.push_back(is_video ? videos.at(video++) : pictures.at(picture++));
    }
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

/// Asks a package's prober. What it is given must outlive it.
class Judge {
 public:
  /// Makes a request that gives no answer, and starts from what the conversation keeps.
  using Ask = std::function<Request(EncodedPrompt, Stats&, Conversation&)>;

  Judge(const PromptEncoder& encoder, Ask ask, int split_layer, const Log& log)
      : encoder_(encoder), ask_(std::move(ask)), split_layer_(split_layer), log_(log) {}

  /// The verdict on the prompt of `request`, noted in `record`, which has its messages and what they show.
  /// `conversation`: scores that it knows of other readings of its turns are not computed again. Throws InputError if
  /// there are no messages, and pieces are wanted; and for too many readings.
  Verdict prompt(Request& request, Record& record, const GatePolicy& policy, Conversation* conversation) const {
    if (policy.mode != Mode::off && policy.pieces && record.messages.empty()) {
      throw InputError("a turn cannot be read in all its forms without the messages: give a policy without pieces");
    }
    Verdict verdict = request.prefill_lower(policy);
    const Clock clock;
    const std::vector<Message> messages = without_pixels(record.messages);
    std::vector<double> scores = request.scores;
    std::map<ReadingKey, double> known;
    if (verdict.p_unsafe) {
      const Views views = each_shown(messages, record.seen, policy.pieces);
      const std::vector<std::optional<Message>> plain = plain_turns(messages);
      Begun begun;
      bool stopped = false;
      const auto is_unsafe = [&](double p) { return !is_safe(p, policy.threshold); };
      const auto note = [&](double& score, double p, bool stops) {
        score = worse(score, p);
        stopped = stopped || (stops && is_unsafe(p));
      };
      const auto in_letters = [](const auto& letters) { return letters.has_value(); };
      if (messages.size() > 1 && std::any_of(plain.begin(), plain.end(), in_letters)) {
        Conversation& start = before(begun, Cache::behind_plain, request);
        const auto found = read(with_letters_of(plain, messages), record.seen, policy, start, scores.size());
        for (size_t at = 0; at < scores.size(); ++at) {
          if (!is_unsafe(scores[at])) note(scores[at], found.at(at), true);
        }
      }
      std::map<size_t, size_t> places;  // of judged turns, among these
      for (size_t n = 0; n < messages.size(); ++n) {
        if (is_judged(messages, n)) places.emplace(n, places.size());
      }
      for_each_reading(messages, plain, policy.pieces, views.frames, [&](size_t n, const Reading& reading) {
        double& score = scores.at(places.at(n));
        if (reading.only_while_safe && is_unsafe(score)) return false;
        const std::vector<Seen> seen = only(views.seen, reading.pictures);
        ReadingKey key = reading_key(reading.messages, seen);
        std::optional<double> p = find(known, key);
        if (!p && conversation) p = find(conversation->known_scores, key);
        if (!p) p = read(reading.messages, seen, policy, before(begun, reading.cache, request)).back();
        if (!std::isnan(*p)) known.emplace(std::move(key), *p);  // a failure may pass
        note(score, reading.weighed ? weighed(*p) : *p, reading.stops);
        return !is_unsafe(score);
      });
      if (policy.checks_steering() && !scores.empty()) {
        stopped = stopped || std::any_of(scores.begin(), scores.end() - 1, is_unsafe);
      }
      double p_unsafe = *verdict.p_unsafe;
      for (const double score : scores) p_unsafe = worse(p_unsafe, score);
      verdict = decide(p_unsafe, stopped ? without_steering(policy) : policy, split_layer_);
      record.stats.gate_ms += clock.ms();
    }
    if (conversation) conversation->known_scores = std::move(known);
    record.verdict = verdict;
    record.scores = std::move(scores);
    return verdict;
  }

  /// The worst p_unsafe of `text`, the answer of `request` to the prompt that is noted in `record` with its verdict,
  /// until a reading is unsafe; NaN if one cannot be read.
  double answer(const std::string& text, const Request& request, const Record& record, const GatePolicy& policy) const {
    const std::vector<Message> messages = without_pixels(record.messages);
    const Views views = each_shown(messages, record.seen, true);
    const bool steered = record.verdict && record.verdict->action == Action::steer;
    double p_unsafe = 0.0;
    Begun begun;
    for_each_reading_of_answer(messages, text, views.frames, steered, [&](const Reading& reading) {
      const std::vector<Seen> seen = only(views.seen, reading.pictures);
      const double p = read(reading.messages, seen, policy, before(begun, reading.cache, request)).back();
      p_unsafe = worse(p_unsafe, reading.weighed ? weighed(p) : p);
      return is_safe(p_unsafe, policy.threshold);
    });
    return p_unsafe;
  }

 private:
  struct Views {
    std::vector<std::vector<Seen>> seen;  // of each picture and video, then of each of `frames`
    std::vector<ShownBy> frames;          // of the videos (PromptEncoder::single_frames)
  };

  /// What readings start from, by Reading::cache.
  using Begun = std::map<Cache, Conversation>;

  /// At first what `request` computed of its prompt, then what the reading before computed.
  static Conversation& before(Begun& begun, Cache cache, const Request& request) {
    const auto [found, is_new] = begun.try_emplace(cache);
    if (is_new) found->second.keep_prefix(request.lend_prefix());
    return found->second;
  }

  Views each_shown(const std::vector<Message>& messages, const std::vector<Seen>& seen, bool frames) const {
    Views views{by_picture(messages, seen), {}};
    size_t number = 0;
    for (size_t n = 0; frames && !seen.empty() && n < messages.size(); ++n) {  // nothing is seen of token ids
      for (const Part& part : shown_in(messages[n])) {
        const std::vector<Seen> whole = views.seen.at(number++);
        const auto* video = std::get_if<VideoPart>(&part);
        if (!video) continue;
        for (auto& [frame, rows] : encoder_.single_frames(*video, whole)) {
          views.frames.emplace_back(n, std::move(frame));
          views.seen.push_back({std::move(rows)});
        }
      }
    }
    return views;
  }

  /// p_unsafe of the last judged `turns` of a dialogue, with its pictures and videos as `seen` has them; NaN if it
  /// cannot be read. It starts from what `begun` has, and leaves it more.
  std::vector<double> read(const std::vector<Message>& messages, const std::vector<Seen>& seen,
                           const GatePolicy& policy, Conversation& begun, size_t turns = 1) const {
    Stats stats;
    try {
      Request request = ask_(encoder_.prepare_seen(messages, seen, stats, turns), stats, begun);
      request.prefill_lower(policy);
      begun.keep_prefix(request.cached_prefix());
      return request.scores;
    } catch (const InputError& err) {
      const std::string reason = err.what();
      if (log_) log_("a text could not be judged, so it counts as unsafe: " + reason);
      return std::vector<double>(turns, std::nan(""));
    }
  }

  static std::optional<double> find(const std::map<ReadingKey, double>& scores, const ReadingKey& reading) {
    const auto found = scores.find(reading);
    return found == scores.end() ? std::nullopt : std::optional(found->second);
  }

  const PromptEncoder& encoder_;
  const Ask ask_;
  const int split_layer_;
  const Log& log_;
};

}  // namespace autosteer
