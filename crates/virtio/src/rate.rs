//! Rate limits: token buckets for requests and bytes, pure logic.
