// Requests to the server. The API key stays in this module.

let key = "";

export function useKey(value) {
  key = value.trim();
}

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function failure(response) {
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not from our server, for example from a proxy.
  }
  return new ApiError(response.status, message);
}

function headers(more = {}) {
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

export async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers(options.headers), cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

export async function json(path, options) {
  return (await request(path, options)).json();
}

// fetch reports no progress of uploads, XMLHttpRequest does.
export function upload(file, onProgress) {
  return new Promise((resolve, reject) => {
    const form = new FormData();
    form.append("purpose", "vision");
    form.append("file", file, "scan");
    const sending = new XMLHttpRequest();
    sending.open("POST", "/v1/files");
    if (key) sending.setRequestHeader("Authorization", `Bearer ${key}`);
    sending.upload.onprogress = (event) => {
      if (event.lengthComputable) onProgress(event.loaded / event.total);
    };
    sending.onerror = () => reject(new ApiError(0, "The upload failed. Is the server still running?"));
    sending.onload = () => {
      let body = null;
      try {
        body = JSON.parse(sending.responseText);
      } catch {
        // Handled below.
      }
      if (sending.status === 200 && body) resolve(body);
      else reject(new ApiError(sending.status, body?.error?.message ?? `The upload failed (${sending.status}).`));
    };
    sending.send(form);
  });
}

function remove(path) {
  return fetch(path, { method: "DELETE", headers: headers(), keepalive: true }).catch(() => {});
}

export const forget = (fileId) => remove(`/v1/files/${fileId}`);

export const forgetDialogue = (answerId) => remove(`/v1/chat/completions/${answerId}`);

// The events of a streamed chat completion.
export async function* chat(body, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ApiError(0, "The connection ended before the answer was complete.");
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event
          .split("\n")
          .filter((line) => line.startsWith("data: "))
          .map((line) => line.slice(6))
          .join("\n");
        if (data === "[DONE]") return;
        if (!data) continue; // a comment that keeps the connection open
        const found = JSON.parse(data);
        if (found.error) throw new ApiError(200, found.error.message);
        yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
