// What every script needs: the server, who asks, and a line for the test that started it.
export const { BASE_URL, TOKEN } = process.env;

/** Tells the test one JSON value. */
export const say = (value) => process.stdout.write(JSON.stringify(value ?? null) + "\n");

/** `fetch` at the server, as the bearer's user. */
export const request = (path, init = {}) => {
  const headers = new Headers(init.headers);
  headers.set("Authorization", `Bearer ${TOKEN}`);
  return fetch(new URL(path, BASE_URL), { ...init, headers });
};

/** Resolves once `claim()` holds; `claim` is looked at every 5 ms. Rejects after 20 s. */
export const until = async (claim, what = claim.toString()) => {
  const end = Date.now() + 20_000;
  while (!claim()) {
    if (Date.now() > end) throw new Error(`Not so after 20 s: ${what}`);
    await new Promise((resume) => setTimeout(resume, 5));
  }
};

/** Runs the scenario that the first argument names. */
export const play = async (scenarios) => {
  const [name, ...more] = process.argv.slice(2);
  await scenarios[name](...more);
};
