// A request as something to run elsewhere: curl for a shell, Python with httpx. Both send what the page sent.

/** One word of a POSIX shell, whatever is in it. */
export function quoted(word) {
  return /^[A-Za-z0-9_./:=@%+-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`;
}

/** curl's own quoting of a file's name inside -F, so that `;` and `,` belong to the name; `-` would be its input. */
function path(name) {
  if (/^[A-Za-z0-9_.][A-Za-z0-9_.-]*$/.test(name)) return name;
  return `"${(name === "-" ? "./-" : name).replace(/[\\"]/g, "\\$&")}"`;
}

/** `request` is {url, names, fields, keyed}: names of files, and [name, text] pairs in order. */
export function curl({ url, names, fields, keyed }) {
  const lines = [`curl -sS ${quoted(url)}`];
  if (keyed) lines.push(`-H "Authorization: Bearer $API_KEY"`);
  for (const name of names) lines.push(`-F ${quoted(`image=@${path(name)}`)}`);
  for (const [name, text] of fields) lines.push(`--form-string ${quoted(`${name}=${text}`)}`);
  return lines.join(" \\\n  ");
}

/** A JSON string is a Python string as well. */
const literal = (value) => JSON.stringify(value);

function listed(values) {
  const inline = `[${values.map(literal).join(", ")}]`;
  return inline.length <= 88 ? inline : `[\n${values.map((value) => `        ${literal(value)},\n`).join("")}    ]`;
}

export function python({ url, names, fields, keyed }) {
  const grouped = new Map();
  for (const [name, text] of fields) grouped.set(name, [...(grouped.get(name) ?? []), text]);
  const data = [...grouped].map(([name, texts]) => {
    const many = name === "classes" || name === "templates";
    return `    ${literal(name)}: ${many ? listed(texts) : literal(texts[0])},\n`;
  });
  const files = names.map((name) => `    ("image", Path(${literal(name)}).read_bytes()),\n`);
  return [
    ...(keyed ? ["import os\n"] : []),
    "from pathlib import Path\n\nimport httpx\n\n",
    `images = [\n${files.join("")}]\n`,
    `fields = {\n${data.join("")}}\n`,
    "response = httpx.post(\n",
    `    ${literal(url)},\n    files=images,\n    data=fields,\n`,
    ...(keyed ? [`    headers={"Authorization": f"Bearer {os.environ['API_KEY']}"},\n`] : []),
    "    timeout=120,\n)\n",
    "response.raise_for_status()\n",
    'for result in response.json()["results"]:\n',
    '    if result["error"]:\n        print(result["error"]["message"])\n    else:\n',
    '        print(result["baseline"]["label"], "->", result["label"], round(result["score"], 3))\n',
  ].join("");
}
