/* AutoSteer as C functions: load a package, ask it, read the guarded answer. Text is UTF-8.
 *
 * Functions that return int (autosteer_abi aside) return 0, or the exit code that autosteer-run has for the same error;
 * autosteer_error() then says in one line what is wrong. No exception leaves these functions, and nothing is written to
 * stdout or stderr. An engine and a picture may be used by several threads at once; a request, a stream, or a
 * conversation with all its streams, by one at a time. Whatever has been made is released once, by its own function;
 * all of these take NULL, too, and the order does not matter. A NULL where something is needed is an error.
 * Not checked, and undefined: a handle that was released, two threads in one stream, a buffer that is smaller than
 * said, an engine used after fork() in the child, and a package whose files are written to while it is loaded (its
 * weights are mapped: put a new folder in its place, and open that).
 *
 * docs/embedding.md has whole programs.
 */
#ifndef AUTOSTEER_AUTOSTEER_H
#define AUTOSTEER_AUTOSTEER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define AUTOSTEER_API __attribute__((visibility("default")))

/* What this header promises. It changes when a program has to be compiled again; fields and functions that are added do
 * not change it. The library's file name ends with it: libautosteer.so.1. */
#define AUTOSTEER_ABI 1

/* What functions return. */
enum {
  AUTOSTEER_OK = 0,
  AUTOSTEER_FAILED = 1,       /* anything else: no memory, the system, an audit record, another ABI */
  AUTOSTEER_BAD_PACKAGE = 3,  /* missing, damaged, for CUDA, without a gate, its gate does not work here, or its logits
                               * are not finite */
  AUTOSTEER_BAD_DEVICE = 4,   /* no onnxruntime, or too old a one */
  AUTOSTEER_BAD_INPUT = 5,    /* a prompt, picture, option or request is unusable, or too long */
  AUTOSTEER_CANCELLED = 130   /* by autosteer_cancel */
};

typedef struct autosteer_engine autosteer_engine;             /* a loaded package */
typedef struct autosteer_image autosteer_image;               /* a picture in memory */
typedef struct autosteer_request autosteer_request;           /* a dialogue, and how to answer it */
typedef struct autosteer_stream autosteer_stream;             /* an answer, while it is made */
typedef struct autosteer_conversation autosteer_conversation; /* what the turns of a dialogue share */

/* --- the library --------------------------------------------------------------------------------------------------*/

/* "0.1.0", and the ABI it was built with. */
AUTOSTEER_API const char *autosteer_version(void);
AUTOSTEER_API int autosteer_abi(void);

/* The error of this thread's last failed call, in one line of valid UTF-8, until the thread's next one that fails. */
AUTOSTEER_API const char *autosteer_error(void);

/* Where lines for an operator go: a prober or monitor that fails, an answer that cannot be judged (each counts as
 * unsafe), and onnxruntime's own errors. Never a prompt. NULL: nowhere, as at first. One for the whole process; called
 * by any thread, one at a time. It must not call the library and must not longjmp; an exception of it ends there. */
typedef void (*autosteer_log)(const char *line, void *context);
AUTOSTEER_API void autosteer_set_log(autosteer_log log, void *context);

/* --- an engine ----------------------------------------------------------------------------------------------------*/

/* Check and load a package (a folder), to run on the CPU. options: NULL, or JSON with any of
 *     {"threads": at most 4 for each CPU of the machine; 0 for every CPU that this process may use,
 *      "max_tiles": cut a picture into at most this many tiles; ignored by models that always cut alike (SmolVLM), and
 *                   a long narrow picture may take more,
 *      "low_memory": true to load the image graph for each picture, after all hashes of the package (about 1 s a GB),
 *                    and drop it afterwards,
 *      "files": false to refuse requests that name files (JSON from somebody else could read yours),
 *      "policy": that of every request; one whose JSON has "policy", "threshold", "strength", "pieces",
 *                "judge_answers" or a trusted message is refused (JSON from somebody else could turn the gate off),
 *      "judge_answers": whether to judge the answers of requests that do not say it (below); else the package says it,
 *      "advise_pages": true to ask Linux for huge pages and to give back pages that only loading reads; this advises on
 *                      every mapping of the process that grows during the call,
 *      "onnxruntime": path of libonnxruntime.so, or of its folder; else $AUTOSTEER_ONNXRUNTIME, else the usual places,
 *      "audit": a file that a line of JSON is appended to for each request; autosteer_next fails where it cannot be
 *               written (docs/security.md),
 *      "audit_texts": true for lines with the words of prompts and answers, not only their digests}
 * An unknown key is an error. */
AUTOSTEER_API int autosteer_open(const char *package, const char *options, autosteer_engine **engine);
AUTOSTEER_API void autosteer_close(autosteer_engine *engine);

/* C and C++ programs call this one, by the name of the other: it fails if this header is not the library's. */
AUTOSTEER_API int autosteer_open_abi(int abi, const char *package, const char *options, autosteer_engine **engine);
#define autosteer_open(package, options, engine) autosteer_open_abi(AUTOSTEER_ABI, package, options, engine)

/* What a package is. Valid as long as the engine. */
typedef struct autosteer_info {
  const char *precision;   /* "fp32", "fp16", "int8", "int4" */
  const char *onnxruntime; /* its version */
  int64_t context_length;  /* most tokens of a prompt and its answer together: a prompt has fewer */
  int guarded;             /* 0: it has no gate, and runs with policy "off" only */
  int takes_images, takes_videos;
  double threshold, strength; /* the defaults of requests; 0 without a gate */
} autosteer_info;
AUTOSTEER_API const autosteer_info *autosteer_describe(const autosteer_engine *engine);

/* --- pictures -----------------------------------------------------------------------------------------------------*/

/* A picture from 8-bit pixels: rows from the top, red, green, blue; `stride` bytes from one row to the next, or 0 for
 * 3 * width. The data is copied: (height - 1) * stride + 3 * width bytes. A picture has at most 50,000,000 pixels. */
AUTOSTEER_API int autosteer_image_from_rgb(int64_t width, int64_t height, int64_t stride, const uint8_t *data,
                                           autosteer_image **image);

/* A picture from the bytes of a PNG or JPEG file, or from such a file (of at most 100,000,000 bytes). */
AUTOSTEER_API int autosteer_image_from_bytes(const void *data, size_t size, autosteer_image **image);
AUTOSTEER_API int autosteer_image_from_file(const char *path, autosteer_image **image);

AUTOSTEER_API void autosteer_image_free(autosteer_image *image);

/* --- a request ----------------------------------------------------------------------------------------------------*/

/* A request from JSON, or an empty one from NULL:
 *     {"messages": [{"role": "system" | "user" | "assistant", "parts": ["text", {"image": "file.png"},
 *                   {"video": ["frame1.png", "frame2.png", ...], "seconds": [0, 0.5, ...]}, ...],
 *                   "trusted": true | false}, ...],
 *      "policy": "steer" | "stop" | "report" | "off", "threshold": number, "strength": number,
 *      "pieces": true | false, "judge_answers": true | false,
 *      "sampling": {"max_tokens": 1 or more, "temperature": 0 or more, "top_k": 0 (all) or more, "top_p": above 0 to 1,
 *                    "min_p": 0 to 1, "repetition_penalty": above 0, "presence_penalty", "frequency_penalty": -2 to 2,
 *                    "logit_bias": {"token id": -100 to 100, ...}, "seed": 0 or more, "stop": [text, ...],
 *                    "speculate": true | false}}
 * Only "messages" is required, of a message "role" and "parts". {"messages": [], "policy": "stop"} is an empty request
 * with settings, to be filled by the functions below. Without settings: "steer", the package's threshold (settings:
 * below 1) and strength (0 to 1e6), turns read in pieces, the likeliest token each time ("temperature": 0, "top_p": 1,
 * "repetition_penalty": 1, no other penalty or bias), "seed" 0, "speculate" true, at most 256 tokens. An unknown key is
 * an error.
 *
 * With "steer" and "stop" the gate judges an answer as the dialogue's next turn, before any of it is shown: if it is
 * steered, if "judge_answers" or else the package says so, and if the temperature is above 1, the repetition penalty is
 * below 1 or above 1.05, or there is a logit bias. A judged answer comes when it is complete, and needs room for one
 * more turn in the context. A steered answer is greedy, whatever "sampling" says; with a logit bias it is stopped
 * instead. "pieces": false reads turns as wholes alone: prompts of several sentences start two to three times as fast,
 * and can hide a request. The package's judge_answers then does not apply, and unless "judge_answers" is true, steered
 * answers are shown unjudged, and a dialogue with an unsafe turn before the last is steered.
 *
 * autosteer_run checks settings, autosteer_next what messages contain. A request may be run any number of times, and be
 * added to in between. */
AUTOSTEER_API int autosteer_request_new(const char *json, autosteer_request **request);
AUTOSTEER_API void autosteer_request_free(autosteer_request *request);

/* Begin a message of "system", "user" or "assistant"; add to the message begun last. Texts need no escaping. */
AUTOSTEER_API int autosteer_request_turn(autosteer_request *request, const char *role);
AUTOSTEER_API int autosteer_request_text(autosteer_request *request, const char *text);
AUTOSTEER_API int autosteer_request_image(autosteer_request *request, const autosteer_image *image);
AUTOSTEER_API int autosteer_request_video(autosteer_request *request, const autosteer_image *const *frames,
                                          size_t count);

/* The same, with the second at which each frame is shown: from the video's beginning, 0 to 1,000,000, not descending.
 * Without (or NULL), frames are 1/24 s apart. Qwen2.5-VL and Qwen3-VL read it. */
AUTOSTEER_API int autosteer_request_video_at(autosteer_request *request, const autosteer_image *const *frames,
                                             const double *seconds, size_t count);

/* Say that your program wrote the message begun last: a system turn, or this engine's own answer in this dialogue,
 * unchanged, that was not sampled as above (temperature above 1, ...). The gate does not judge it, unless it is the
 * last. A trusted user turn is an error of autosteer_next. */
AUTOSTEER_API int autosteer_request_trust(autosteer_request *request);

/* Tokens of the prompt, those of pictures and videos included (which are encoded for it). The decoder does not run. A
 * prompt that does not fit the context is AUTOSTEER_BAD_INPUT; its message has the count. Cannot be cancelled. */
AUTOSTEER_API int autosteer_count_tokens(const autosteer_engine *engine, const autosteer_request *request,
                                         int64_t *count);

/* What the gate makes of a request's prompt, without an answer: half of the model reads it. No answer will be judged,
 * so it reads as with "judge_answers": false, whatever the request or the package says. The outputs mean the same as in
 * autosteer_chunk; NULL for what you do not need. *action is never freed. Cannot be cancelled. */
AUTOSTEER_API int autosteer_score(const autosteer_engine *engine, const autosteer_request *request, const char **action,
                                  int *unsafe, double *p_unsafe);

/* --- an answer ----------------------------------------------------------------------------------------------------*/

/* A piece of an answer. */
typedef struct autosteer_chunk {
  const char *json;          /* everything: see below */
  const char *text;          /* "" while a character is incomplete or a stop string may have begun */
  const char *finish_reason; /* NULL; of the last piece "stop", "length", or "refused": the refusal text stands in
                              * place of the answer; behind what was shown, if a monitor stopped it */
  const char *action;        /* what the gate did: "pass" (always with "report" and "off"), "steer", "stop" */
  int unsafe;                /* whether the prompt is unsafe; 0 with action "stop": the answer was ("answer" in json) */
  double p_unsafe;           /* its score; NaN if the prober failed (unsafe), or with policy "off" */
  int64_t token;             /* -1 for the text of a refusal */
} autosteer_chunk;

/* `json`: {"text", "token", "verdict", "finish_reason", "device", "timings"}; the last two are null before the last
 * piece.
 *     verdict: p_unsafe (null: not finite, or policy off), unsafe, action, policy, threshold, strength, layer, answer
 *              (null, or of an answer that was watched or judged {"p_unsafe", "unsafe", "threshold"})
 *     timings: prompt_tokens, reused_tokens, completion_tokens (those withheld, too), drafted_tokens, accepted_tokens,
 *              image_tiles, kv_bytes; in milliseconds vision_ms, embed_ms, lower_ms, gate_ms, upper_ms (null: it never
 *              ran), ttft_ms (to the first piece), decode_ms, monitor_ms; decode_tok_s (null for one token) */

/* Begin an answer. The request is copied, and nothing is computed yet. */
AUTOSTEER_API int autosteer_run(const autosteer_engine *engine, const autosteer_request *request,
                                autosteer_stream **stream);

/* The next piece, or NULL in *chunk after the last one. Valid until the stream's next call. To stop an answer early,
 * end the stream; a judged one is computed as a whole before its first piece, and only autosteer_cancel interrupts
 * that. After an error the stream has ended. */
AUTOSTEER_API int autosteer_next(autosteer_stream *stream, const autosteer_chunk **chunk);

/* From any thread, as long as the stream has not been ended: an autosteer_next that is running returns
 * AUTOSTEER_CANCELLED within an operator's time, also while it reads the prompt (with "low_memory": after the hashes);
 * so does the next one, unless the answer is complete. */
AUTOSTEER_API void autosteer_cancel(autosteer_stream *stream);

AUTOSTEER_API void autosteer_end(autosteer_stream *stream);

/* --- a dialogue ---------------------------------------------------------------------------------------------------*/

/* What the turns of a dialogue share: what earlier requests had is not computed again. Each request still has all
 * messages of the dialogue. */
AUTOSTEER_API int autosteer_conversation_begin(const autosteer_engine *engine, autosteer_conversation **conversation);

/* autosteer_run within a dialogue. End the stream before you run the next one; otherwise that one computes all.
 * autosteer_next and autosteer_end of its streams use the conversation, too: all in one thread at a time. */
AUTOSTEER_API int autosteer_conversation_run(autosteer_conversation *conversation, const autosteer_request *request,
                                             autosteer_stream **stream);

AUTOSTEER_API void autosteer_conversation_end(autosteer_conversation *conversation);

#ifdef __cplusplus
}
#endif

#endif
