/* AutoSteer for other languages, as C functions. Text is UTF-8; options, requests and chunks are JSON.
 *
 *     autosteer_engine *engine;
 *     autosteer_stream *stream;
 *     const char *chunk;
 *     if (autosteer_open("package/", NULL, &engine)) puts(autosteer_error());
 *     if (autosteer_run(engine, "{\"messages\": [{\"role\": \"user\", \"parts\": [\"hello\"]}]}", &stream)) ...
 *     while (!autosteer_next(stream, &chunk) && chunk) puts(chunk);
 *     autosteer_end(stream);
 *     autosteer_close(engine);
 *
 * Functions return 0, or autosteer-run's exit code for the same error (3: bad package, 4: device not available, 5: bad
 * input, 1: anything else); autosteer_error() then says in one line what is wrong. No exception leaves these functions.
 * An engine may be used by several threads, a stream or a conversation by one at a time.
 */
#ifndef AUTOSTEER_H
#define AUTOSTEER_H

#ifdef __cplusplus
extern "C" {
#endif

#define AUTOSTEER_API __attribute__((visibility("default")))

typedef struct autosteer_engine autosteer_engine;
typedef struct autosteer_stream autosteer_stream;
typedef struct autosteer_conversation autosteer_conversation;

/* Check and load a package. options: NULL, or
 *     {"threads": 0 for every CPU this process may use, "max_tiles": cut a picture into at most this many tiles,
 *      "low_memory": true to load the image graph for each picture, and drop it afterwards}
 * No key is required; an unknown one is an error. */
AUTOSTEER_API int autosteer_open(const char *package, const char *options, autosteer_engine **engine);

/* Begin an answer. request:
 *     {"messages": [{"role": "system" | "user" | "assistant", "parts": ["text", {"image": "file.png"},
 *                   {"video": ["frame1.png", "frame2.png", ...]}, ...], "trusted": true | false}, ...],
 *      "policy": "steer" | "stop" | "monitor" | "off", "threshold": number, "strength": number,
 *      "sampling": {"max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop": [text, ...],
 *                    "speculate": true | false}}
 * Only "messages" is required, and of a message "role" and "parts"; an unknown key is an error. The gate judges every
 * turn but those that are "trusted": system turns and answers that your program wrote itself. */
AUTOSTEER_API int autosteer_run(autosteer_engine *engine, const char *request, autosteer_stream **stream);

/* The next chunk of the answer, or NULL in *chunk if it has ended:
 *     {"text", "token", "verdict": {...}, "finish_reason": null | "stop" | "length" | "refused", "device", "timings"}
 * The string is valid until the stream's next call. After an error the stream has ended. */
AUTOSTEER_API int autosteer_next(autosteer_stream *stream, const char **chunk);

/* Free a stream, finished or not. NULL is allowed. */
AUTOSTEER_API void autosteer_end(autosteer_stream *stream);

/* Begin a dialogue whose turns share their KV caches and encoded pictures: what earlier requests had is not computed
 * again. Each request still has all messages of the dialogue. */
AUTOSTEER_API int autosteer_conversation_begin(autosteer_engine *engine, autosteer_conversation **conversation);

/* autosteer_run within a dialogue. End the stream before you run the next one; otherwise that one computes all. */
AUTOSTEER_API int autosteer_conversation_run(autosteer_conversation *conversation, const char *request,
                                             autosteer_stream **stream);

/* Free a conversation. Open streams stay valid. NULL is allowed. */
AUTOSTEER_API void autosteer_conversation_end(autosteer_conversation *conversation);

/* Free an engine. Open streams and conversations stay valid. NULL is allowed. */
AUTOSTEER_API void autosteer_close(autosteer_engine *engine);

/* The error of this thread's last failed call, in one line of valid UTF-8. */
AUTOSTEER_API const char *autosteer_error(void);

#ifdef __cplusplus
}
#endif

#endif
