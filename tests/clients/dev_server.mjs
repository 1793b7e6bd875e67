// A development server as bundlers have it: express, with `compression` and with `http-proxy-middleware` in front of the
// gateway. Prints its address; ends with its standard input.
//
//   node dev_server.mjs http://GATEWAY
import { createRequire } from "node:module";

const require = createRequire(import.meta.url);
const compression = require("compression");
const express = require("express");
const { createProxyMiddleware } = require("http-proxy-middleware");

const app = express();
app.use(compression({ threshold: 0 }));
app.get("/page", (request, response) => response.type("html").send("<!doctype html><title>a page</title>".padEnd(4096)));
app.use(createProxyMiddleware({ target: process.argv[2], pathFilter: "/events" }));
const server = app.listen(0, "127.0.0.1", () => process.stdout.write(`127.0.0.1:${server.address().port}\n`));
process.stdin.on("end", () => process.exit(0)).resume();
